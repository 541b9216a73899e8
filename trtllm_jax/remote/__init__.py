"""An `LLM` whose engine runs in another process: `EngineHost` in the engine's process, `RemoteLLM` in its clients."""
