"""Build, place and wrap the stages of a rank, from process groups to stages that are ready to train.

May import the checks and what they may import. Training, the plan and the command line import it.
"""
