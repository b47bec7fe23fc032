//! A block device that remembers every write, so that any power cut can be tried on a real filesystem.
//!
//! - [`Device`]: one file in memory, served through FUSE, that a loop device stands on; it logs what reaches it.
//! - [`CrashState`]: what of the log a power cut left: all up to an operation, or, of what came after the last flush, a
//!   part, whole or torn.
//! - [`Filesystem`], [`Disk`]: makes one of the kernel's filesystems on it and mounts it, again for every state.
//!
//! Invariants: a state is decided by its kind, its seed and its operation; what a state's mount writes is undone before
//! the next one; nothing stays mounted or attached when a [`Disk`] is dropped, also by a panic.

mod device;
mod filesystem;
mod state;

pub use device::{Device, Op};
pub use filesystem::{Disk, Filesystem, Mounted};
pub use state::{CrashState, Cut, Replay};
