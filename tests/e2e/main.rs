//! The real binary on real files: two hosts on loopback, real git, real signals.
//!
//! Each test has a pair of its own ([`pair::Pair`]); waiting is looking again until a deadline.

#![allow(clippy::unwrap_used)] // a test that can't go on has failed

mod adopt;
mod bandwidth;
mod brakes;
mod bulk;
mod copies;
mod damage;
mod drill;
mod everything;
mod follow;
mod forks;
mod git;
mod git_server;
mod graphs;
mod guard;
mod hands_off;
mod image;
mod kills;
mod lines;
mod links;
mod load_balancers;
mod loss;
mod network;
mod pair;
mod plan;
mod plan_peer;
mod points;
mod power;
mod promote_to;
mod races;
mod recorder;
mod references;
mod refusals;
mod relay;
mod renames;
mod repacks;
mod resume;
mod roles;
mod runbook;
mod sampler;
mod seed;
mod shortages;
mod stand_in;
mod sweep;
mod switchovers;
mod trust;
mod unequal;
mod walks;
mod watches;
mod writers;
