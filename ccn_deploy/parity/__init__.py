"""Does a runtime compute the function that was trained?

:func:`~ccn_deploy.parity.collect.collect` measures a runtime against the float64 reference and
keeps what it saw; :func:`~ccn_deploy.parity.judge.judge` compares that with a policy. Neither this
module nor judging imports torch.
"""
