//! For tests: both ends without a network, homes made by a seed, an independent comparison of trees.
//!
//! - [`chance`]: the seeded source of all that is random here.
//! - [`home`]: makes a home and changes it.
//! - [`pair`]: an active and a standby in one process, wired as the daemons wire them, that can be cut off and killed.
//! - [`failover`]: two nodes that change roles, for a model checker.
//! - [`mod@line`]: a line between two network namespaces, as slow, long and lossy as a test wants it.
//! - [`load`]: pushes, forks, collections and LFS uploads at given rates, by the real git; the program `coldspare-load`.
//! - [`fault`]: a disk that fails when it is told to.
//! - [`model`]: a disk in memory that knows what of it is durable.
//! - [`world`]: both ends, a network and a git that writes, with one seed for all of it, and what has to hold.
//! - [`sent`]: what was sent for one changeset, to be sent once more.
//! - [`blocklog`]: a block device that remembers every write, so that any power cut can be tried.
//! - [`compare`]: reads a tree with nothing of coldspare's and tells what differs.
//! - [`supervise`]: runs a program and kills or fails it at a chosen call.
//!
//! Architecture invariant: nothing that ships depends on this crate.

pub mod blocklog;
pub mod chance;
pub mod compare;
pub mod failover;
pub mod fault;
pub mod home;
pub mod line;
pub mod load;
pub mod model;
pub mod pair;
pub mod sent;
pub mod supervise;
pub mod tamper;
pub mod world;

pub use chance::Chance;
pub use compare::Tree;
pub use fault::FaultyDisk;
pub use model::ModelDisk;
pub use pair::{Ending, Pair, Setup, Stopped};
pub use sent::Sent;
