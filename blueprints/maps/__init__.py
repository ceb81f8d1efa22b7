"""Names of the weights of other libraries, by those of shipped blueprints."""
