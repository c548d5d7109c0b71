"""Programs on top of the library: the command line, traces, the demonstration pipeline, the report on this machine."""
