"""Stands in for plotly (12,300 files): `utils/misc.py` imports it for charts that no tool of the ONNX route draws."""
