"""A build, stage after stage: what every stage needs is fixed first, then it is made, proven, bundled and published."""
