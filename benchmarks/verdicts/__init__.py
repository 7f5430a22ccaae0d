"""Whether verdicts are right: `mutants` against the reference, `evalplus_agreement` against the package evalplus."""
