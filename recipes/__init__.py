"""The shipped recipes, one TOML file per experiment."""
