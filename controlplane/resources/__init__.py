"""What users may want: one immutable type per kind, in the words of the F5 XC API. No I/O."""
