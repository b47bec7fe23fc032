//! The real binary on real files: two hosts on loopback, real git, real signals.
//!
//! Each test has a pair of its own ([`pair::Pair`]); waiting is looking again until a deadline.

#![allow(clippy::unwrap_used)] // a test that can't go on has failed

mod everything;
mod follow;
mod kills;
mod pair;
mod push;
mod refusals;
mod shortages;
mod sweep;
