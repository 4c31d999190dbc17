"""The devices a run can use: one small interface for cpu, cuda and npu.

This folder alone acts on device names; the settings only offer them as values.
"""
