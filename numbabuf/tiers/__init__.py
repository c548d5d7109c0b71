"""Memory in three tiers with buffers that move between them: `HierarchicalBufferPool`. Built on the pool room."""
