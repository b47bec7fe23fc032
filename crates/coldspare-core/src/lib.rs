//! What coldspare decides, without doing any of it.
//!
//! Paths, entries, the layout and ordering rules of git repositories, the node's control record, and both ends
//! of a session as state machines.
//!
//! Architecture invariant: this crate is pure. No file, socket, clock, randomness, thread-local or async appears
//! here; `now` and seeds are arguments. `clippy.toml` beside this crate's manifest bans the ways around it.

#![forbid(unsafe_code)]

pub mod brakes;
pub mod changeset;
pub mod codec;
pub mod compare;
pub mod control;
pub mod entry;
pub mod exclude;
pub mod fingerprint;
pub mod follow;
pub mod git;
pub mod healing;
pub mod id;
pub mod intake;
pub mod key;
pub mod path;
pub mod problem;
pub mod seeded_bugs;

pub use changeset::{Baseline, ContentRef, Op};
pub use entry::{Body, Digest, Entry, Meta, Time, Xattr};
pub use id::{ClusterId, Epoch, NodeId, RootId, Seq, SessionId};
pub use path::{Name, PathError, RelPath};
pub use problem::{Problem, ProblemKind};
