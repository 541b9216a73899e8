"""Models without an engine: loading, differentiable calls, generation as one pure function, conversion."""
