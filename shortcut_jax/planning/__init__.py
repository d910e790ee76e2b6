"""What a step needs on machines that are not here: memory, FLOPs, messages, money."""
