"""An `LLM` whose engine runs in another process: `EngineHost` beside the engine, `RemoteLLM` where the requests are."""
