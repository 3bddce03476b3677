# shellcheck shell=bash
# The second node: a virtual machine with a kernel of its own. Sourced by e2e/cluster.

guest_runs() { false; }
prepare_guest() { fail "the second node is not there yet"; }
up_node2() { fail "the second node is not there yet"; }
down_node2() { :; }
run_node2() { fail "node2 does not run"; }
