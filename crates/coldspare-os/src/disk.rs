//! The filesystem as coldspare uses it: the trait and its plain types.
//!
//! Says what each operation promises, for [`RealDisk`](crate::RealDisk) and for a model of a disk alike. It makes no
//! system call.
//!
//! Words: an *entry* is a name in a directory; `at` and `name` are the directory and one component. `name` is checked
//! by [`component::check_name`](crate::component::check_name) in every operation, which answers `InvalidInput`; errors
//! below leave that out. Errors of the kernel keep their number (`raw_os_error`).

use std::io;
use std::path::Path;
use std::time::Duration;

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// Anything else.
    Unknown,
}

/// What the filesystem says of one entry, as `statx(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stat {
    /// What the entry is.
    pub kind: FileKind,
    /// Permission bits, 12 of them.
    pub mode: u16,
    /// Numeric owner.
    pub uid: u32,
    /// Numeric group.
    pub gid: u32,
    /// Bytes of content.
    pub size: u64,
    /// Allocated blocks of 512 bytes; fewer than `size` needs when there are holes.
    pub blocks: u64,
    /// Names of the inode.
    pub nlink: u32,
    /// The filesystem.
    pub dev: u64,
    /// The inode within the filesystem.
    pub ino: u64,
    /// Last change of the content: seconds since 1970, negative before, and nanoseconds after them.
    pub mtime: (i64, u32),
    /// Last change of anything, set by the kernel alone.
    pub ctime: (i64, u32),
}

/// One name of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The name's bytes.
    pub name: Box<[u8]>,
    /// What it named when it was listed.
    pub kind: FileKind,
}

/// The metadata an entry is to have.
#[derive(Clone, Copy, Debug)]
pub struct Attributes<'a> {
    /// Permission bits, at most `0o7777`.
    pub mode: u16,
    /// Numeric owner; not `u32::MAX`, which the kernel takes for "unchanged".
    pub uid: u32,
    /// Numeric group; not `u32::MAX`.
    pub gid: u32,
    /// Seconds since 1970 and nanoseconds below 1,000,000,000.
    pub mtime: (i64, u32),
    /// Names and values of all `user.*` and POSIX ACL attributes that remain; others of these namespaces are removed,
    /// attributes of other namespaces (`security.*`, `trusted.*`) stay as they are.
    pub xattrs: &'a [(&'a [u8], &'a [u8])],
}

/// What a filesystem has left for us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes, without those reserved for the superuser.
    pub free_bytes: u64,
    /// Inodes; `u64::MAX` where the filesystem counts none (btrfs).
    pub free_inodes: u64,
}

/// LIMIT: of permission bits; more is refused.
const MODE_MAX: u16 = 0o7777;

/// LIMIT: of nanoseconds in a time; more is refused, since two such values mean "now" and "unchanged" to the kernel.
const NANOS_MAX: u32 = 999_999_999;

/// The attribute that holds a file's or a directory's access ACL.
pub(crate) const ACCESS_ACL: &[u8] = b"system.posix_acl_access";

/// The attribute that holds the ACL which entries created in a directory inherit.
pub(crate) const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

impl Attributes<'_> {
    /// Whether `Attributes` decides over extended attributes of this name: `user.*` and the two POSIX ACLs.
    pub fn covers(name: &[u8]) -> bool {
        name.starts_with(b"user.") || name == ACCESS_ACL || name == DEFAULT_ACL
    }

    /// Checks what the types don't say.
    ///
    /// # Errors
    /// `InvalidInput`: values that the kernel would take for something else, or an attribute that isn't covered.
    pub fn check(&self) -> io::Result<()> {
        let fault = if self.mode > MODE_MAX {
            "a mode beyond the permission bits"
        } else if self.uid == u32::MAX || self.gid == u32::MAX {
            "an impossible owner"
        } else if self.mtime.1 > NANOS_MAX {
            "a time with too many nanoseconds"
        } else if !self.xattrs.iter().all(|(name, _)| Attributes::covers(name)) {
            "an extended attribute that is neither user.* nor a POSIX ACL"
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::InvalidInput, fault))
    }
}

/// A filesystem as coldspare uses it; everything is relative to held directory descriptors.
///
/// - Opening: [`open_root`](Disk::open_root), [`open_dir`](Disk::open_dir), [`open_file`](Disk::open_file).
/// - Names: `create_file`, `create_dir`, `symlink`, `link`, `rename`, `exchange`, `remove_file`, `remove_dir`. Each is
///   atomic for readers and durable only after [`sync_dir`](Disk::sync_dir) of every directory it changed.
/// - Looking: `stat*`, `list*`, `read_link`, `xattrs*`, `space`.
/// - Content: `read_at`, `write_at`, `set_len`, `copy_range`; durable after [`sync_file`](Disk::sync_file).
/// - Metadata: `set_attributes*`.
/// - Durability: `sync_file`, `sync_dir`, `sync_fs`.
///
/// All block. A call that a signal interrupted is made again, except the three of durability. One system call each
/// unless said otherwise.
pub trait Disk: Clone + Send + Sync + 'static {
    /// A held directory.
    type Dir: Send + Sync + 'static;
    /// A held regular file.
    type File: Send + Sync + 'static;

    /// Milliseconds since 1970, by the clock that stamps what is changed on this disk.
    fn now_ms(&self) -> u64;

    /// Opens a root by its configured path.
    ///
    /// Symlinks in `path` are resolved once, here; the directory stays the same one if they change later.
    ///
    /// # Errors
    /// `NotADirectory`, `NotFound`, `PermissionDenied`.
    fn open_root(&self, path: &Path) -> io::Result<Self::Dir>;

    /// Opens the directory at `path` below `at`, components joined by `/`; empty opens `at` anew.
    ///
    /// # Errors
    /// `InvalidInput`: a component that [`check_path`](crate::component::check_path) refuses. `ELOOP`: a component on the
    /// way is a symlink. `NotADirectory`: a component is anything else, or the last one a symlink. `EXDEV`: a component is
    /// a mount point and this disk stays on one filesystem.
    fn open_dir(&self, at: &Self::Dir, path: &[u8]) -> io::Result<Self::Dir>;

    /// Opens a regular file for reading, without waiting and without changing its access time where we may.
    ///
    /// Cost: two system calls; three for a file of another owner without privileges.
    ///
    /// # Errors
    /// `ELOOP`: a symlink. `InvalidInput`, "not a regular file": anything else that is none. `EXDEV` as for `open_dir`.
    /// `WouldBlock`: another process holds a lease on the file.
    fn open_file(&self, at: &Self::Dir, name: &[u8]) -> io::Result<Self::File>;

    /// Creates an empty file, mode 0600, and opens it for reading and writing.
    ///
    /// # Errors
    /// `AlreadyExists`: also for a symlink, whatever it names.
    fn create_file(&self, at: &Self::Dir, name: &[u8]) -> io::Result<Self::File>;

    /// Opens a regular file, which is ours, for reading and writing.
    ///
    /// # Errors
    /// As [`open_file`](Disk::open_file).
    fn open_file_to_write(&self, at: &Self::Dir, name: &[u8]) -> io::Result<Self::File>;

    /// Creates an empty directory, mode 0700.
    ///
    /// # Errors
    /// `AlreadyExists`.
    fn create_dir(&self, at: &Self::Dir, name: &[u8]) -> io::Result<()>;

    /// Creates a symlink to `target`, opaque bytes.
    ///
    /// # Errors
    /// `AlreadyExists`; `InvalidInput` for a target with NUL, `NotFound` for an empty one.
    fn symlink(&self, target: &[u8], at: &Self::Dir, name: &[u8]) -> io::Result<()>;

    /// Gives the file `from_name` another name; a symlink is linked itself, not what it names.
    ///
    /// # Errors
    /// `AlreadyExists`; `EXDEV` over filesystems; `EPERM` for a directory; `EMLINK` at the filesystem's limit of names.
    fn link(&self, from: &Self::Dir, from_name: &[u8], to: &Self::Dir, to_name: &[u8]) -> io::Result<()>;

    /// Moves an entry, replacing a file by a file or an empty directory by a directory.
    ///
    /// Two names of one file: nothing happens and both remain (POSIX).
    ///
    /// # Errors
    /// `DirectoryNotEmpty`, `IsADirectory`, `NotADirectory`; `EXDEV` over filesystems.
    fn rename(&self, from: &Self::Dir, from_name: &[u8], to: &Self::Dir, to_name: &[u8]) -> io::Result<()>;

    /// Swaps two entries of any kinds in one step.
    ///
    /// # Errors
    /// `NotFound`: one of them is missing, nothing moved. `EINVAL`: the filesystem can't (some network filesystems).
    fn exchange(&self, a: &Self::Dir, a_name: &[u8], b: &Self::Dir, b_name: &[u8]) -> io::Result<()>;

    /// Removes a name of anything but a directory.
    ///
    /// # Errors
    /// `IsADirectory`, `NotFound`.
    fn remove_file(&self, at: &Self::Dir, name: &[u8]) -> io::Result<()>;

    /// Removes an empty directory.
    ///
    /// # Errors
    /// `DirectoryNotEmpty`, `NotADirectory`, `NotFound`; `EBUSY` for a mount point.
    fn remove_dir(&self, at: &Self::Dir, name: &[u8]) -> io::Result<()>;

    /// Looks at an entry, a symlink itself included.
    ///
    /// For a mount point this is the mounted root, of another `dev`, even where opening it is refused.
    ///
    /// # Errors
    /// `NotFound`.
    fn stat(&self, at: &Self::Dir, name: &[u8]) -> io::Result<Stat>;

    /// Looks at a held directory.
    ///
    /// # Errors
    /// Of the medium only.
    fn stat_dir(&self, dir: &Self::Dir) -> io::Result<Stat>;

    /// Looks at a held file.
    ///
    /// # Errors
    /// Of the medium only.
    fn stat_file(&self, file: &Self::File) -> io::Result<Stat>;

    /// Lists names and kinds, without `.` and `..`, in the filesystem's order; each call starts anew.
    ///
    /// RACE: an entry that is created, removed or renamed meanwhile may be missing or, renamed, appear under both names.
    ///
    /// Cost: two system calls, two more from the second listing on, and one per 32 KiB of names; one more per name where the
    /// filesystem doesn't tell kinds.
    ///
    /// # Errors
    /// `NotFound`: the directory itself was removed.
    fn list(&self, dir: &Self::Dir) -> io::Result<Vec<Listed>>;

    /// Lists names with what [`stat`](Disk::stat) says of each; names that vanish in between are left out.
    ///
    /// RACE: as [`list`](Disk::list), and each entry is of its own instant.
    ///
    /// Cost: as `list`, and one system call per name.
    ///
    /// # Errors
    /// As `list`; an entry that can't be looked at fails the whole.
    fn list_stat(&self, dir: &Self::Dir) -> io::Result<Vec<(Box<[u8]>, Stat)>>;

    /// Reads the target of a symlink.
    ///
    /// # Errors
    /// `InvalidInput`: not a symlink. `NotFound`.
    fn read_link(&self, at: &Self::Dir, name: &[u8]) -> io::Result<Vec<u8>>;

    /// Reads into `buf` from byte `offset`; the count is less than `buf` only at the end of the file.
    ///
    /// Cost: one system call where there is enough, one more at the end.
    ///
    /// # Errors
    /// Of the medium; `buf` is then undefined.
    fn read_at(&self, file: &Self::File, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes all of `buf` at byte `offset`; a gap before it becomes a hole.
    ///
    /// # Errors
    /// `StorageFull` and others; part of `buf` may be written.
    fn write_at(&self, file: &Self::File, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// Cuts or grows a file to `len` bytes, growing by a hole.
    ///
    /// # Errors
    /// `FileTooLarge`, and those of the medium.
    fn set_len(&self, file: &Self::File, len: u64) -> io::Result<()>;

    /// Copies `len` bytes within the kernel, sharing blocks where the filesystem can.
    ///
    /// Ranges of one file don't overlap. Holes may become zeros.
    ///
    /// Cost: one system call per GiB; where the kernel refuses, two per 128 KiB.
    ///
    /// # Errors
    /// `UnexpectedEof`: the source ends before `from_offset + len`; what there was is copied.
    fn copy_range(&self, from: &Self::File, from_offset: u64, to: &Self::File, to_offset: u64, len: u64) -> io::Result<()>;

    /// Has `to`, which is empty, share all blocks of `from`.
    ///
    /// # Errors
    /// `Unsupported` (`EOPNOTSUPP`), `EINVAL`: the filesystem can't; `EXDEV` over filesystems.
    fn clone_file(&self, from: &Self::File, to: &Self::File) -> io::Result<()>;

    /// Reads the extended attributes of a file or directory, of all namespaces, sorted by name; an empty name is `at`.
    ///
    /// Empty for symlinks, and where the filesystem has none. Left out: what only the superuser may read, in
    /// `security.*` and `trusted.*`. POSIX ACLs are the kernel's raw bytes.
    ///
    /// RACE: attributes that change meanwhile may be of different instants; the entry's ctime tells.
    ///
    /// Cost: three system calls, and when there are any, one more and one per attribute.
    ///
    /// # Errors
    /// `PermissionDenied`: a `user.*` attribute of a file that we may not read. `EXDEV` as for `open_dir`.
    fn xattrs(&self, at: &Self::Dir, name: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>>;

    /// Reads the extended attributes of a held file, as [`xattrs`](Disk::xattrs).
    ///
    /// Cost: one system call, and one per attribute.
    ///
    /// # Errors
    /// As `xattrs`.
    fn xattrs_of_file(&self, file: &Self::File) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>>;

    /// Gives a held file exactly these attributes and says what it has then.
    ///
    /// What already holds isn't set again. The result can differ where the filesystem can't hold a value (times out of
    /// its range are clamped) or the kernel drops a bit (setgid of a group that isn't ours): compare it.
    ///
    /// At no instant does anybody but the owner have more access than before the call or after it. After an error or a
    /// crash the entry has some of the attributes, and the call can be made again.
    ///
    /// Cost: for a new file four system calls, and one each for owner, mode and every extended attribute that differs.
    ///
    /// # Errors
    /// `InvalidInput`: as [`Attributes::check`], or a malformed ACL. `Unsupported` (`ENOTSUP`): extended attributes or
    /// ACLs on a filesystem without them; mode and times are not set then, since the group bits of a mode that came
    /// with an ACL are its mask and would grant too much alone. `PermissionDenied`.
    fn set_attributes_of_file(&self, file: &Self::File, attributes: &Attributes<'_>) -> io::Result<Stat>;

    /// Gives a held directory exactly these attributes, as [`set_attributes_of_file`](Disk::set_attributes_of_file).
    ///
    /// # Errors
    /// As `set_attributes_of_file`.
    fn set_attributes_of_dir(&self, dir: &Self::Dir, attributes: &Attributes<'_>) -> io::Result<Stat>;

    /// Gives a symlink its owner and time, and says what it has then.
    ///
    /// Cost: two to four system calls.
    ///
    /// # Errors
    /// `InvalidInput`: not a symlink, or values as in [`Attributes::check`]. `PermissionDenied`.
    fn set_attributes_of_symlink(&self, at: &Self::Dir, name: &[u8], uid: u32, gid: u32, mtime: (i64, u32)) -> io::Result<Stat>;

    /// Gives an existing entry of any kind exactly these attributes, as
    /// [`set_attributes_of_file`](Disk::set_attributes_of_file); of a symlink only owner and time.
    ///
    /// The entry needn't be readable to us, and isn't opened: nothing waits, no device notices.
    ///
    /// Cost: two system calls more than by descriptor.
    ///
    /// # Errors
    /// As `set_attributes_of_file`; `EXDEV` as for `open_dir`.
    fn set_attributes(&self, at: &Self::Dir, name: &[u8], attributes: &Attributes<'_>) -> io::Result<Stat>;

    /// Makes the content and metadata of a file durable, not its name.
    ///
    /// # Errors
    /// Never to be tried again: the kernel may have dropped what it couldn't write, and a second call would succeed.
    fn sync_file(&self, file: &Self::File) -> io::Result<()>;

    /// Has what was written to a file go to the medium, as far as that can be had, so that a later [`Disk::sync_file`] or
    /// [`Disk::sync_fs`] has less to wait for. Promises nothing.
    fn start_writing(&self, file: &Self::File);

    /// Has the content of a file, which is durable, read from the medium when it is read next, as far as that can be had.
    fn forget_cached(&self, file: &Self::File);

    /// Lets others work for a while, who may be about to finish something.
    fn pause(&self, time: Duration);

    /// Makes the names in a directory and its own metadata durable.
    ///
    /// # Errors
    /// As [`sync_file`](Disk::sync_file).
    fn sync_dir(&self, dir: &Self::Dir) -> io::Result<()>;

    /// Makes everything on the filesystem of `dir` durable.
    ///
    /// `dir` was opened before the writes in question: failures are reported from its opening on (Linux 5.8).
    ///
    /// # Errors
    /// As [`sync_file`](Disk::sync_file), for a write of anybody.
    fn sync_fs(&self, dir: &Self::Dir) -> io::Result<()>;

    /// Says what the filesystem of `dir` has left.
    ///
    /// # Errors
    /// Of the medium only.
    fn space(&self, dir: &Self::Dir) -> io::Result<Space>;
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Attributes<'_> = Attributes { mode: 0o644, uid: 1, gid: 1, mtime: (0, 0), xattrs: &[] };

    fn check(attributes: Attributes<'_>, expected: Option<io::ErrorKind>) {
        assert_eq!(attributes.check().err().map(|e| e.kind()), expected, "{attributes:?}");
    }

    #[test]
    fn values_with_another_meaning_to_the_kernel_are_refused() {
        let refused = Some(io::ErrorKind::InvalidInput);
        check(PLAIN, None);
        check(Attributes { mode: 0o7777, mtime: (-1, 999_999_999), ..PLAIN }, None);
        check(Attributes { mode: 0o10000, ..PLAIN }, refused);
        check(Attributes { uid: u32::MAX, ..PLAIN }, refused);
        check(Attributes { gid: u32::MAX, ..PLAIN }, refused);
        check(Attributes { mtime: (0, 1_000_000_000), ..PLAIN }, refused);
        check(Attributes { mtime: (0, rustix::fs::UTIME_NOW as u32), ..PLAIN }, refused);
        check(Attributes { xattrs: &[(b"user.a", b"")], ..PLAIN }, None);
        check(Attributes { xattrs: &[(ACCESS_ACL, b""), (DEFAULT_ACL, b"")], ..PLAIN }, None);
        check(Attributes { xattrs: &[(b"security.capability", b"")], ..PLAIN }, refused);
        check(Attributes { xattrs: &[(b"system.nfs4_acl", b"")], ..PLAIN }, refused);
    }
}
