"""The trainer: one page, in the order things happen."""

import dataclasses
import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from clu import parameter_overview
from clu.metrics import Average
from ml_collections import ConfigDict

from shortcut_jax import (
    accumulation,
    checkpoint,
    pairs,
    parameters,
    pretrained,
    rng,
    run,
    snapshots,
    spaces,
    state,
)
from shortcut_jax import averages as averages_lib
from shortcut_jax import program as program_lib
from shortcut_jax.clock import Clock
from shortcut_jax.data import pipeline
from shortcut_jax.errors import UserError
from shortcut_jax.evaluation import grid, measuring, reports
from shortcut_jax.logs import MetricLogger
from shortcut_jax.models.dit import DiT
from shortcut_jax.objectives import Batch, Objective, Progress, Velocities
from shortcut_jax.parallel import distributed, preemption, sharding
from shortcut_jax.state import TrainState

######################################################################################
#  The step: targets, one forward and backward pass over the whole batch, AdamW, EMA
######################################################################################


NONFINITE = "nonfinite"  # share of steps whose loss or gradient was not finite


def make_train_step(
    config: ConfigDict,
    network: DiT,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    num_shards: int,
    draw_x1: spaces.DrawX1,
) -> Callable[[TrainState, Batch], TrainState]:
    """The training step as a pure function, to be compiled with shardings by the caller.

    Args:
      config: of the run.
      network: applied with online and with EMA parameters.
      objective: builds the targets.
      optimizer: from `state.build_optimizer`.
      num_shards: parts the batch is sharded into.
      draw_x1: makes x_1 of the images of a batch.
    """

    apply = state.apply_fn(network)

    def train_step(old: TrainState, batch: Batch) -> TrainState:
        draw = rng.draws(config.seed, "train", old.step)
        batch = dataclasses.replace(batch, image=draw_x1(draw, batch.image))
        progress = Progress(old.step, config.total_steps)
        teacher = old.teacher
        if objective.promotes_student:
            promote = progress.starts_stage(objective.num_stages)
            teacher = jax.tree.map(lambda t, s: jnp.where(promote, s, t), teacher, old.ema)
        velocities = Velocities(
            online=functools.partial(apply, old.params),
            ema=functools.partial(apply, old.ema),
            teacher=functools.partial(apply, teacher) if objective.teacher == "targets" else None,
        )
        targets, scalars = objective.targets(draw, batch, velocities, progress, num_shards)
        pixels = targets.target[0].size

        def loss_fn(params, rows, own):
            predict = state.apply_fn(network.clone(rows=None)) if own else apply
            prediction = predict(params, rows.x_t, rows.t, rows.d, rows.labels)
            row_loss = jnp.mean((prediction - rows.target) ** 2, axis=(1, 2, 3))  # [B]
            adaptive = objective.adaptive_weight(jax.lax.stop_gradient(row_loss), pixels)
            return jnp.mean(rows.weight * adaptive * row_loss), row_loss

        (loss, row_loss), grads = accumulation.value_and_grad(
            loss_fn, old.params, targets, config.accumulation_steps, network.rows
        )
        updates, opt_state = optimizer.update(grads, old.opt_state, old.params)
        params = optax.apply_updates(old.params, updates)
        ema = optax.incremental_update(params, old.ema, 1 - config.ema_rate)
        further = averages_lib.update(old.averages, params, old.step)

        scalars = {
            **scalars,
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            # Of the difference and not of `updates`: the compiler then needs no second pass over
            # the optimizer's state for it.
            "update_norm": optax.global_norm(jax.tree.map(jnp.subtract, params, old.params)),
            "param_norm": optax.global_norm(params),
        }
        finite = jnp.isfinite(loss) & jnp.isfinite(scalars["grad_norm"])
        averages = {name: Average.from_model_output(a[None]) for name, a in scalars.items()}
        for index, name in enumerate(objective.branches):
            mask = targets.branch == index
            averages[f"loss/{name}"] = Average.from_model_output(row_loss, mask=mask)
        if config.optimizer.on_nonfinite == "skip":
            # (The teacher is not among them: whether it is promoted does not depend on the loss.)
            learned = (params, ema, further, opt_state, averages)
            none = jax.tree.map(jnp.zeros_like, averages)
            kept = (old.params, old.ema, old.averages, old.opt_state, none)
            params, ema, further, opt_state, averages = jax.tree.map(
                lambda new, keep: jnp.where(finite, new, keep), learned, kept
            )
        averages[NONFINITE] = Average.from_model_output(1.0 - finite[None])

        if old.metrics:  # empty only while the names of the metrics are being found out
            # Averages start again after each log; doing so here saves the host a dispatch.
            fresh = old.step % config.log.every == 0
            averages = jax.tree.map(
                lambda sum, new: jnp.where(fresh, new, sum + new), dict(old.metrics), averages
            )
        return TrainState(old.step + 1, params, ema, opt_state, teacher, averages, further)

    return train_step


def build_program(
    setup: run.Setup, batch_shape: Batch, draw_x1: spaces.DrawX1
) -> program_lib.Program:
    """The step of a run with its shapes and shardings, for batches of a shape."""
    config, optimizer = setup.config, state.build_optimizer(setup.config)
    step = make_train_step(
        config, setup.network, setup.objective, optimizer, setup.mesh.size, draw_x1
    )
    return program_lib.build(setup, step, optimizer, batch_shape)


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> TrainState:
    """Trains to `config.total_steps`, resuming from the newest checkpoint in `workdir`.

    Args:
      config: locked config (`shortcut_jax.config`).
      workdir: gets config.json, metrics.jsonl, checkpoints/, eval/, tensorboard/, finished.json
        and, where they are asked for, snapshots/ and pairs/.

    Returns:
      The final train state.

    Raises:
      UserError: anything the user can fix, before any device work where it can be known.
      preemption.Preempted: SIGTERM came; what was done is saved.
    """

    ##################################################################################
    #  Check everything that can be checked; open what the run stands on
    ##################################################################################

    run.check(config)
    resuming, has_pairs = distributed.of_process_0(
        [run.has_checkpoint(workdir), not pairs.missing(config, workdir)]
    )
    origins = pretrained.find(config, resuming, has_pairs)
    averages_lib.check_tracked(config)
    setup = run.prepare(config, measures=config.eval.every > 0)
    objective, mesh = setup.objective, setup.mesh
    clock = Clock(config.batch_size, config.total_steps, mesh.size)
    with clock.phase("start"), distributed.together():
        train_data, images = run.open_data(setup)
        run.claim_workdir(config, workdir)
    distributed.agree({"fingerprint of the data": train_data.fingerprint, **setup.space.record()})
    distributed.check_shared(workdir, "config.json")
    checkpoints = checkpoint.Checkpoints(
        workdir, keep=config.checkpoint.keep, copy=config.checkpoint.copy
    )
    if objective.teacher == "pairs":
        with clock.phase("pairs"):
            train_data = pairs.prepare(setup, origins.teacher, workdir)
    encode, draw_x1 = spaces.way_from(setup.space, train_data.holds)

    ##################################################################################
    #  State: shapes, then shardings, then arrays - new, or from a checkpoint
    ##################################################################################

    def empty_batch() -> Batch:
        image = jnp.zeros((config.batch_size, *train_data.image_shape), train_data.dtype)
        noise = image if objective.teacher == "pairs" else None
        return Batch(encode(image), jnp.zeros(config.batch_size, jnp.int32), noise)

    program = build_program(setup, jax.eval_shape(empty_batch), draw_x1)
    state_shape, state_sharding = program.state_shape, program.state_sharding
    rows = sharding.batch_sharding(mesh)
    if config.eval.every:
        evaluator = measuring.Evaluator(setup, images, state_sharding.params)
        ways_to_sample = grid.cells(setup, grid.Grid(config.eval.steps_in_loop))

    start = distributed.of_process_0(checkpoints.latest())
    unevaluated = False  # the checkpoint was saved in haste, before an evaluation that was due
    if start is None:
        train_state = jax.jit(program.init, out_shardings=state_sharding)()
        train_state = pretrained.start_from(origins, train_state, state_sharding)
    else:
        with clock.phase("start"):
            meta = checkpoints.meta(start)
            run.check_resume(config, meta, train_data, checkpoints.directory / str(start))
            shapes = checkpoint.with_shardings(state_shape, state_sharding)
            train_state = TrainState(**checkpoints.restore(start, state.fields(shapes)))
            run.record_config(config, workdir)
            clock.load_state_dict(meta["clock"])
            unevaluated = meta.get("unevaluated", False)
        logging.info("Resumed from step %d of %s.", start, workdir)
    if jax.process_index() == 0:
        # Shapes and shardings: no process can read the values that others hold.
        overview = parameter_overview.get_parameter_overview(
            train_state.params, include_stats="sharding"
        )
        logging.info("\n%s", overview)

    ##################################################################################
    #  Compile ahead of the loop
    ##################################################################################

    before = clock.state_dict()["seconds/compile"]  # of earlier starts
    with clock.phase("compile"):
        compiled = program.compile_several(config.steps_per_dispatch)
    run.report_compiled(config, compiled, clock.state_dict()["seconds/compile"] - before)
    distributed.gather("compiled")  # gloo waits 30 s, no more, for the first step of the others

    ##################################################################################
    #  Loop. Do not change the order: evaluate -> save (-> leave) -> next batch -> step -> log.
    #  Evaluating and saving see the same, old parameters, and no batch is drawn before the save:
    #  a run resumed from that save does what the uninterrupted one did next. Between these the
    #  devices may get several steps at once; nothing is due within them.
    ##################################################################################

    first = start or 0
    stored = snapshots.Snapshots(workdir, config.averages, first)
    batches = pipeline.batches(
        train_data,
        batch_size=config.batch_size,
        seed=config.seed,
        start_step=first,
        num_steps=max(config.total_steps - first, 0),
        rows=sharding.own_rows(config.batch_size, mesh),
        flip=config.data.flip,
        num_workers=config.data.get("workers", 0) if train_data.holds == "images" else 0,
        prefetch=max(8, config.steps_per_dispatch),
    )

    def next_batch() -> Batch:
        arrays = sharding.to_global(next(batches), rows)
        return Batch(**{**arrays, "image": encode(arrays["image"])})

    logger = MetricLogger(
        workdir,
        config.total_steps,
        tensorboard=config.log.tensorboard,
        write=jax.process_index() == 0,
        restart_step=start,
    )
    with checkpoints, batches, logger, preemption.Notice() as notice:
        for step, count in program_lib.dispatches(config, first):
            new = step > first  # nothing is due twice after a resume
            last = step == config.total_steps
            leave = notice.reached()
            evaluate = config.eval.every and step % config.eval.every == 0 and (new or unevaluated)

            if evaluate and not leave:
                jax.block_until_ready(train_state)
                with clock.phase("evaluate"):
                    params = parameters.of(train_state, config.eval.params)
                    results = evaluator.run(params, step, ways_to_sample)
                    reports.report(workdir, results, logger)

            save = last or leave or step % config.checkpoint.every == 0
            if new and (save or stored.due(step)):
                jax.block_until_ready(train_state)
                _check_finite(_averages(train_state), step, config, checkpoints)
                with clock.phase("checkpoint"):
                    stored.save(step, train_state.averages)
                    if save:
                        position = run.data_position(config, train_data, step)
                        meta = run.checkpoint_meta(config, position, clock.state_dict())
                        meta["unevaluated"] = bool(evaluate and leave)
                        checkpoints.save(step, state.fields(train_state), meta)
            if leave and (evaluate or not last):
                stored.close()
                checkpoints.close()
                raise preemption.Preempted(f"asked to leave at step {step} of {workdir}")
            if last:
                break

            with clock.phase("data"):
                ahead = [next_batch() for _ in range(count)]
                ahead += ahead[-1:] * (config.steps_per_dispatch - count)  # left alone
                used = sharding.to_global(np.int32(count), sharding.replicated(mesh))
            with jax.transfer_guard("disallow"), jax.profiler.TraceAnnotation("dispatch"):
                train_state = compiled(train_state, tuple(ahead), used)

            done = step + count
            if done % config.log.every == 0:
                averages = _averages(train_state)
                with jax.profiler.TraceAnnotation("log"):
                    _check_finite(averages, done, config, checkpoints)
                    checkpoints.check()
                    logger.scalars(done, averages, clock.tick(done))

        with clock.phase("checkpoint"):
            checkpoints.close()
            stored.close()
    run.mark_finished(workdir, config.total_steps)
    return train_state


def _averages(train_state: TrainState) -> dict[str, float]:
    """Averages since the last log, of what occurred at all; waits for the device."""
    averages = jax.device_get(train_state.metrics)
    return {k: float(a.total / a.count) for k, a in sorted(averages.items()) if a.count > 0}


def _check_finite(
    averages: dict[str, float], step: int, config: ConfigDict, checkpoints: checkpoint.Checkpoints
) -> None:
    if config.optimizer.on_nonfinite == "skip" or averages[NONFINITE] == 0:
        return
    checkpoints.wait()
    first = (step - 1) // config.log.every * config.log.every + 1
    kept = checkpoints.latest()
    found = "no checkpoint was saved" if kept is None else f"the newest good checkpoint is {kept}"
    raise UserError(
        f"training became non-finite between steps {first} and {step} (loss {averages['loss']}, "
        f"gradient norm {averages['grad_norm']}), {found}; expected finite values: lower "
        "optimizer.lr, or run again with optimizer.on_nonfinite=skip to leave such steps out."
    )
