#!/bin/sh
# Cargo calls this instead of rustc, for the crates of this workspace (RUSTC_WORKSPACE_WRAPPER). Those that end up in the
# fuzzing program count which of their edges were taken. Others' crates are those of every other build, so that they
# need not be compiled again: their generic code is compiled in ours, and is counted.
rustc=$1
shift
case "$*" in
*"--crate-name lepton_"*)
	set -- "$@" -Ccodegen-units=1 -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
		-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
		-Cllvm-args=-sanitizer-coverage-trace-compares
	;;
esac
exec "$rustc" "$@"
