#!/bin/sh
# Runs a compilation by nvcc, whose command are the arguments, and keeps what ptxas says about registers and
# spills beside the object, in OBJECT.ptxas: python_tests/test_kernel_registers.py reads it.
object=
previous=
for argument; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
log=$object.ptxas
"$@" 2> "$log"
status=$?
grep -vE '^ptxas info|bytes stack frame' "$log" >&2
if [ $status -ne 0 ]; then rm -f "$log"; fi
exit $status
