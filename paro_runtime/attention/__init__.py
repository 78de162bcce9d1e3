"""One attention call of the runtime: which backend and precision serve it, its pattern, and its dense stand-ins."""
