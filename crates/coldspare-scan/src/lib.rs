//! The active's side: what changed, and what it is now.
//!
//! - [`index`]: what was captured of each path, in an embedded store; a cache that can be rebuilt by reading all.
//! - [`watch`]: hints from the kernel of what may have changed.
//! - [`dirty`]: those hints, collected until a cycle takes them.
//! - [`capture`]: one cycle: looks, compares with the index, reads what changed, hands it over.
//! - [`bulk`]: large content that travels beside the changesets.
//! - [`compare`]: what was sent, compared with what the standby has.
//! - [`inherit`]: the index of a home that came about by replication.
//! - [`proof`]: a look beside the cycles for what the watch missed.
//!
//! Architecture invariant: events are hints, scans are truth. Nothing here is correct only because an event came.
//! Nothing here knows the network or the standby's disk.

#![forbid(unsafe_code)]

mod batch;
pub mod bulk;
pub mod capture;
pub mod compare;
mod copies;
mod derived;
pub mod dirty;
mod discover;
mod graphs;
mod held;
pub mod index;
pub mod inherit;
mod inspect;
mod links;
mod pack;
pub mod proof;
mod read;
mod rebuilt;
mod references;
mod rename;
mod resume;
mod run;
mod settle;
mod survey;
mod unit;
mod visit;
pub mod waiting;
pub mod watch;
mod writer;
