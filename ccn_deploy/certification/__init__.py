"""Claims about a bundle that users run as tests, in their own pipeline.

::

    pytest --pyargs ccn_deploy.certification --ccn-bundle BUNDLE

:mod:`~ccn_deploy.certification.plugin` is what pytest loads everywhere, and is nearly nothing;
:mod:`~ccn_deploy.certification.claims` are the tests, and
:mod:`~ccn_deploy.certification.session` collects evidence and judges it with the functions that
the commands use.
"""
