"""`/v1/score` and `/v1/rerank`."""
