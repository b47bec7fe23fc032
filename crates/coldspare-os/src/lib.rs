//! The system calls of coldspare: files relative to held directory descriptors, and a few facts about the process.
//!
//! Everything that touches a replicated tree goes through the trait [`Disk`]. [`RealDisk`] is the kernel's; a model
//! that can crash takes its place in tests. No path is ever looked up twice: a directory is opened once below its
//! root, and from then on named entries are one component away from a descriptor.
//!
//! Architecture invariants:
//! - This crate depends on nothing of ours and decides nothing: no policy, no retry but of interrupted calls, no log.
//! - No call follows a symlink, except [`Disk::open_root`], which resolves the path an administrator configured.
//! - No call leaves the directory that it was given; [`component`] is the only check of names.
//! - Names and symlink targets are bytes, never text.

mod attributes;
pub mod component;
mod disk;
pub mod fanotify;
mod group;
mod handle;
mod listing;
pub mod mounts;
mod process;
pub mod processes;
mod real;
#[cfg(test)]
mod scratch;

pub use disk::{Attributes, Disk, FileKind, Listed, Space, Stat};
pub use group::{GroupLeader, ProcessHandle};
pub use process::{
    Capability, FileLock, boot_id, give_up_capability, keep_capabilities, network_filesystem, open_files_limit_max, openat2_works,
    raise_open_files_limit, release_free_memory, resident_bytes, set_idle_io_priority, share_heaps,
};
pub use real::{RealDir, RealDisk, RealFile};
