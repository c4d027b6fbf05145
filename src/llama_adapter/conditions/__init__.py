"""Conditions: what a picture, a recording or a video adds to the prompts of every adapted layer.

`pictures` and `recordings` read files, `processors` and `towers` turn them into features with a frozen encoder, and
`cache` keeps those. `modules` has the learnable part, which `ConditionConfig` describes; `perception` runs all of it.
"""
