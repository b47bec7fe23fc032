//! Which calls count, on which file they act, and how each may fail.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// A call that counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The kernel's name for it.
    pub name: &'static str,
    /// What it acts on; of two paths the one that it makes.
    pub path: PathBuf,
    /// What it does.
    pub effect: Effect,
}

/// What a call does, as far as it matters for how it may fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Opens a file that may be made by it.
    Open,
    /// Takes room, or may.
    Take,
    /// Makes durable.
    Sync,
    /// Changes or removes what is there.
    Change,
}

impl Effect {
    /// Whether a kernel may answer such a call with `errno`.
    pub fn may_fail_with(self, errno: Errno) -> bool {
        match errno {
            Errno::MFILE | Errno::NFILE => self == Effect::Open,
            Errno::NOSPC | Errno::DQUOT | Errno::INTR => self != Effect::Change,
            _ => true,
        }
    }
}

/// A call as the kernel asks about it.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) id: u64,
    /// The thread.
    pub(super) thread: u32,
    pub(super) number: i64,
    pub(super) args: [u64; 6],
}

/// One line of the list.
pub(super) struct Listed {
    pub(super) number: i64,
    name: &'static str,
    on: On,
    effect: Effect,
}

/// Where a call names its file: the positions of arguments.
#[derive(Clone, Copy)]
enum On {
    Fd(usize),
    /// A path, from the working folder.
    Path(usize),
    /// A folder, and a path in it.
    At(usize, usize),
}

/// The call, when it counts.
pub(super) fn counted(asked: &Asked, below: &[PathBuf]) -> Option<Call> {
    let listed = CALLS.iter().find(|listed| listed.number == asked.number)?;
    let path = path_of(asked, listed.on)?;
    let counts = below.iter().any(|dir| path.starts_with(dir));
    counts.then_some(Call { name: listed.name, path, effect: listed.effect })
}

fn path_of(asked: &Asked, on: On) -> Option<PathBuf> {
    let of_fd = |fd: u64| std::fs::read_link(format!("/proc/{}/fd/{}", asked.thread, fd as u32)).ok();
    let of_path = |at: Option<u64>, address: u64| -> Option<PathBuf> {
        let path = text_at(asked.thread, address)?;
        // How a path names an open file that it must not follow.
        if let Ok(fd) = path.strip_prefix("/proc/self/fd") {
            return of_fd(fd.to_str()?.parse().ok()?);
        }
        if path.is_absolute() {
            return Some(path);
        }
        let dir = match at {
            Some(fd) if fd as i32 != libc::AT_FDCWD => of_fd(fd)?,
            _ => std::fs::read_link(format!("/proc/{}/cwd", asked.thread)).ok()?,
        };
        Some(dir.join(path))
    };
    match on {
        On::Fd(fd) => of_fd(asked.args[fd]),
        On::Path(path) => of_path(None, asked.args[path]),
        // Calls on a descriptor itself give no path at all.
        On::At(fd, path) if asked.args[path] == 0 => of_fd(asked.args[fd]),
        On::At(fd, path) => of_path(Some(asked.args[fd]), asked.args[path]),
    }
}

/// The text that ends with NUL at an address of the program.
fn text_at(thread: u32, address: u64) -> Option<PathBuf> {
    let memory = File::open(format!("/proc/{thread}/mem")).ok()?;
    let mut out = Vec::new();
    while out.len() < PATH_BYTES_MAX {
        // Not across a page, behind which there may be nothing.
        let at = address + out.len() as u64;
        let mut part = [0; 256];
        let len = part.len().min((PAGE_BYTES - at % PAGE_BYTES) as usize);
        let read = memory.read_at(&mut part[..len], at).ok()?;
        let part = &part[..read];
        match part.iter().position(|&b| b == 0) {
            Some(end) => {
                out.extend_from_slice(&part[..end]);
                return Some(Path::new(OsStr::from_bytes(&out)).into());
            }
            None if read == 0 => return None,
            None => out.extend_from_slice(part),
        }
    }
    None
}

const PATH_BYTES_MAX: usize = 4096;
const PAGE_BYTES: u64 = 4096;

macro_rules! listed {
    ($($number:ident $name:literal $on:expr, $effect:ident;)*) => {
        &[$(Listed { number: libc::$number, name: $name, on: $on, effect: Effect::$effect }),*]
    };
}

/// Calls that change files. `openat2` is missing: its flags can't be seen by a filter, and coldspare creates without it.
#[rustfmt::skip]
const COMMON: &[Listed] = listed! {
    SYS_openat "openat" On::At(0, 1), Open;
    SYS_write "write" On::Fd(0), Take;
    SYS_writev "writev" On::Fd(0), Take;
    SYS_pwrite64 "pwrite64" On::Fd(0), Take;
    SYS_pwritev "pwritev" On::Fd(0), Take;
    SYS_pwritev2 "pwritev2" On::Fd(0), Take;
    SYS_copy_file_range "copy_file_range" On::Fd(2), Take;
    SYS_sendfile "sendfile" On::Fd(0), Take;
    SYS_ioctl "ioctl_ficlone" On::Fd(0), Take;
    SYS_truncate "truncate" On::Path(0), Take;
    SYS_ftruncate "ftruncate" On::Fd(0), Take;
    SYS_fallocate "fallocate" On::Fd(0), Take;
    SYS_mkdirat "mkdirat" On::At(0, 1), Take;
    SYS_symlinkat "symlinkat" On::At(1, 2), Take;
    SYS_linkat "linkat" On::At(2, 3), Take;
    SYS_renameat "renameat" On::At(2, 3), Take;
    SYS_renameat2 "renameat2" On::At(2, 3), Take;
    SYS_setxattr "setxattr" On::Path(0), Take;
    SYS_lsetxattr "lsetxattr" On::Path(0), Take;
    SYS_fsetxattr "fsetxattr" On::Fd(0), Take;
    SYS_fsync "fsync" On::Fd(0), Sync;
    SYS_fdatasync "fdatasync" On::Fd(0), Sync;
    SYS_syncfs "syncfs" On::Fd(0), Sync;
    SYS_unlinkat "unlinkat" On::At(0, 1), Change;
    SYS_fchmod "fchmod" On::Fd(0), Change;
    SYS_fchmodat "fchmodat" On::At(0, 1), Change;
    SYS_fchown "fchown" On::Fd(0), Change;
    SYS_fchownat "fchownat" On::At(0, 1), Change;
    SYS_utimensat "utimensat" On::At(0, 1), Change;
    SYS_removexattr "removexattr" On::Path(0), Change;
    SYS_lremovexattr "lremovexattr" On::Path(0), Change;
    SYS_fremovexattr "fremovexattr" On::Fd(0), Change;
};

/// `libc` doesn't know its number everywhere; newer calls have the same on all machines.
const FCHMODAT2: &Listed = &Listed { number: 452, name: "fchmodat2", on: On::At(0, 1), effect: Effect::Change };

/// Calls that newer machines no longer have.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const OLD: &[Listed] = listed! {
    SYS_open "open" On::Path(0), Open;
    SYS_creat "creat" On::Path(0), Open;
    SYS_mkdir "mkdir" On::Path(0), Take;
    SYS_symlink "symlink" On::Path(1), Take;
    SYS_link "link" On::Path(1), Take;
    SYS_rename "rename" On::Path(1), Take;
    SYS_unlink "unlink" On::Path(0), Change;
    SYS_rmdir "rmdir" On::Path(0), Change;
    SYS_chmod "chmod" On::Path(0), Change;
    SYS_chown "chown" On::Path(0), Change;
    SYS_lchown "lchown" On::Path(0), Change;
    SYS_utimes "utimes" On::Path(0), Change;
    SYS_futimesat "futimesat" On::At(0, 1), Change;
};
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[Listed] = &[];

/// All of them.
pub(super) static CALLS: std::sync::LazyLock<Vec<&'static Listed>> =
    std::sync::LazyLock::new(|| COMMON.iter().chain([FCHMODAT2]).chain(OLD).collect());
