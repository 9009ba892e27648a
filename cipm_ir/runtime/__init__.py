"""Running models: sessions, inputs, and the comparison of two models on the same inputs."""
