"""The train island's top: build, forward step, step, loop, evaluate."""
