"""One step as one graph launch: slots, staging ring, arena, graphs and `InputBufferManager`. Knows no tiers."""
