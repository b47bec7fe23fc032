//! A filesystem in memory that knows what of it is durable.
//!
//! [`ModelDisk`] is a [`coldspare_os::Disk`]: deterministic, with a clock that a test advances, errors and faults as the
//! kernel gives them, and somebody else who may change files between two calls.
//!
//! What it assumes of the medium, as ext4, XFS and btrfs promise it:
//! - `sync_file` makes the content and the attributes of that inode durable, not necessarily a name of it.
//! - `sync_dir` makes the names in that directory and its own attributes durable. A rename is one step, also between two
//!   directories: durable in both when either is synced.
//! - A directory that is exchanged into another one gets a new time of modification, as on XFS alone.
//! - `sync_fs` makes everything durable that was done before.
//! - What was not synced may be durable or not, each write by itself; a file may have the length without the bytes.
//! - A failed sync loses what it was to write, though a later one succeeds.
//!
//! Left out: bytes that rot, a sync that lies, blocks of somebody else's in a new file.

mod content;
mod crash;
mod disk;
mod draft;
mod expected;
mod explore;
mod fault;
mod hash;
mod image;
mod log;
mod other;
mod rehearsal;
mod state;
mod store;

pub use crash::{CrashPoint, Crashed, Order};
pub use disk::{ModelDir, ModelDisk, ModelFile};
pub use draft::{Draft, Part};
pub use expected::{Expected, Holds};
pub use explore::{Explored, Limits, VIOLATIONS_MAX, Violation, explore, replay};
pub use fault::{Call, CallKind, Change, ChangeKind, Fault, Spot, SyncCall};
pub use other::Seen;
pub use rehearsal::{Defect, Kind, Rehearsal};
pub use store::{ModelStore, StoreImage};
