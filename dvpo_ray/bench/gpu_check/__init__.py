"""`launch/gpu_check.sh`: one command that proves on a GPU what the tests prove on a CPU, and measures the speeds that the targets are for.

Each step is a process of its own with a time limit (`runner`). What it measures is on disk at once (`figures`), so that a killed step and a
killed script leave what they have. `steps` lists the steps; the same functions run on a CPU with tiny shapes.
"""
