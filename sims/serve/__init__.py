"""An OpenAI-compatible server over the scheduler of `simulate`: one loop, an engine that is simulated or real (docs/serving.md)."""
