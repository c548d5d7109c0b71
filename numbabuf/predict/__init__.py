"""Buffers and graphs that are warm before they are needed: `PredictiveBufferManager` and the factory."""
