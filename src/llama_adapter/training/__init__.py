"""From a recipe to an adapter: settings, plan, loop, loss, packing, optimiser, checkpoints."""
