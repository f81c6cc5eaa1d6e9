"""The rungs of a model that is split over ranks, and their gates."""

from fluxkiln.verify import gates

RUNGS = tuple(rung for rung in gates.RUNGS if rung.name in ("split", "unsplit", "replicas"))
GATES = tuple(gate for gate in gates.GATES if set(gate.rung.split("|")) <= {"split", "unsplit", "replicas"})
