"""Presets and the programs that users start: generate, extend, plan, train."""
