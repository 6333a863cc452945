"""A small model that reasons for thousands of tokens, its problems, and the program that trains it.

`eval.reasoner.problems` generates problems, `python -m eval.reasoner.train` trains, and `eval/reasoner/model` is the
trained model.
"""
