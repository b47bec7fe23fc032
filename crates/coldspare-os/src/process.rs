//! What coldspare asks of the kernel about itself: the boot, one instance, limits, memory.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{FlockOperation, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// An exclusive lock on a file, held by this process until dropped; a process that dies loses it at once.
#[derive(Debug)]
pub struct FileLock {
    _file: OwnedFd,
}

impl FileLock {
    /// Takes the lock on the file at `path`, which is created (mode 0600) if missing and never removed.
    ///
    /// `None`: another process holds it, or another `FileLock` of this one. Doesn't wait.
    ///
    /// # Errors
    /// Those of opening the file; `ELOOP` for a symlink.
    pub fn acquire(path: &Path) -> io::Result<Option<FileLock>> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
        loop {
            let file = retry_on_intr(|| rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR))?;
            match retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)) {
                Err(Errno::WOULDBLOCK) => return Ok(None),
                result => result?,
            }
            // RACE: somebody may have removed the file after we opened it; a lock on a file without a name excludes
            // nobody. One removed later is the same trouble, and nothing of ours does it.
            let held = rustix::fs::fstat(&file)?;
            match rustix::fs::lstat(path) {
                Ok(named) if (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino) => return Ok(Some(FileLock { _file: file })),
                Ok(_) | Err(Errno::NOENT) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Says which boot of the host this is: random, and different after each restart.
///
/// # Errors
/// `/proc/sys` can't be read, or holds no such id.
pub fn boot_id() -> io::Result<[u8; 16]> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    parse_uuid(text.trim_end()).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel's boot id isn't a UUID"))
}

/// Checks that this host lets us do what [`RealDisk`](crate::RealDisk) does everywhere: `openat2`, and `/proc/self/fd`.
///
/// # Errors
/// `Unsupported`: the message says what an administrator does about it.
pub fn openat2_works() -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = retry_on_intr(|| rustix::fs::open(c"/", flags, Mode::empty()))?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    match retry_on_intr(|| rustix::fs::openat2(&root, c".", flags, Mode::empty(), resolve)) {
        // Filters of containers answer EPERM.
        Err(Errno::NOSYS | Errno::PERM) => return Err(io::Error::new(io::ErrorKind::Unsupported, OPENAT2_MISSING)),
        result => drop(result?),
    }
    match rustix::fs::lstat(c"/proc/self/fd") {
        Err(Errno::NOENT) => Err(io::Error::new(io::ErrorKind::Unsupported, PROC_MISSING)),
        Err(e) => Err(e.into()),
        Ok(_) => Ok(()),
    }
}

/// Raises the limit of open files to the most we are allowed, and returns it.
///
/// Where raising fails the limit stays, and is returned; `u64::MAX` is no limit.
pub fn raise_open_files_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let current = if setrlimit(Resource::Nofile, raised).is_ok() { limit.maximum } else { limit.current };
    current.unwrap_or(u64::MAX)
}

/// How many open files this process may ask for; `u64::MAX` is no limit.
pub fn open_files_limit_max() -> u64 {
    getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX)
}

/// Measures the resident memory of this process in bytes: now, and the most it ever was.
///
/// Zeros where `/proc` can't be read.
pub fn resident_bytes() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    (status_bytes(&status, "VmRSS:"), status_bytes(&status, "VmHWM:"))
}

/// Has the threads of this process share at most so many heaps; how many there are already stays.
///
/// glibc gives each of many threads a heap of its own, and memory that one frees another doesn't use: a daemon's resident
/// memory then grows with what passed through it. Threads that share one wait for each other. Elsewhere than on glibc nothing
/// happens.
pub fn share_heaps(at_most: u8) {
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code)]
    // SAFETY: sets a number in the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, i32::from(at_most));
    }
}

/// Gives memory that is free, and is kept for later, back to the system.
///
/// Cost: some milliseconds for a heap of tens of megabytes; others wait for it. Elsewhere than on glibc nothing happens.
pub fn release_free_memory() {
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code)]
    // SAFETY: touches only what is free.
    unsafe {
        libc::malloc_trim(0);
    }
}

const OPENAT2_MISSING: &str = "the system call openat2 is refused. It needs Linux 5.6 or newer; on such a kernel a filter \
    blocks it: remove RestrictSUIDSGID= and DynamicUser= from the systemd unit, or allow openat2 in the container's \
    seccomp profile";

const PROC_MISSING: &str = "/proc/self/fd doesn't exist: mount /proc where coldspare runs";

fn parse_uuid(text: &str) -> Option<[u8; 16]> {
    let digits: Vec<u8> =
        text.bytes().filter(|&b| b != b'-').map(|b| char::from(b).to_digit(16).map(|d| d as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
    (digits.len() == 32).then(|| bytes.try_into().ok())?
}

fn status_bytes(status: &str, field: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.trim().strip_suffix("kB")).and_then(|number| number.trim().parse::<u64>().ok());
    kib.map_or(0, |kib| kib << 10)
}

/// A privilege that coldspare knows by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// `CAP_SYS_ADMIN`.
    SysAdmin,
    /// `CAP_DAC_READ_SEARCH`.
    DacReadSearch,
}

/// Gives up every privilege but these, for good: for this thread, those that it starts, and what they execute.
///
/// Not held is no error: it stays so.
///
/// # Errors
/// As `capset` and `prctl`.
pub fn keep_capabilities(kept: &[Capability]) -> io::Result<()> {
    let kept = kept.iter().fold(CapabilitySet::empty(), |all, one| all | one.bit());
    for number in 0..u64::BITS {
        let bit = CapabilitySet::from_bits_retain(1 << number);
        // Without `CAP_SETPCAP` the bound stays: nothing is executed from here on that could gain by it.
        if !kept.contains(bit) && rustix::thread::remove_capability_from_bounding_set(bit).is_err() {
            break;
        }
    }
    rustix::thread::set_no_new_privs(true)?;
    limit_to(kept)
}

/// Gives one privilege up, for this thread and those that it starts.
///
/// # Errors
/// As `capset`.
pub fn give_up_capability(capability: Capability) -> io::Result<()> {
    limit_to(!capability.bit())
}

/// Lets this thread's reads of the disk wait for everybody else's.
///
/// # Errors
/// As `ioprio_set`. Source: `ioprio_set(2)`.
#[allow(unsafe_code)] // no crate that is kept well wraps this call
pub fn set_idle_io_priority() -> io::Result<()> {
    const WHO_THREAD: libc::c_int = 1;
    const IDLE_CLASS: libc::c_int = 3 << 13;
    // SAFETY: plain numbers; 0 is the calling thread.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_THREAD, 0, IDLE_CLASS) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn limit_to(kept: CapabilitySet) -> io::Result<()> {
    let held = rustix::thread::capabilities(None)?;
    let permitted = held.permitted & kept;
    let sets = CapabilitySets { effective: held.effective & permitted, permitted, inheritable: held.inheritable & permitted };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

impl Capability {
    fn bit(self) -> CapabilitySet {
        match self {
            Capability::SysAdmin => CapabilitySet::SYS_ADMIN,
            Capability::DacReadSearch => CapabilitySet::DAC_READ_SEARCH,
        }
    }
}

/// The kind of a network filesystem, whose changes by other hosts this host's kernel isn't told of; `None` for any other.
///
/// # Errors
/// As `statfs`.
pub fn network_filesystem(path: &Path) -> io::Result<Option<&'static str>> {
    // Source: linux/magic.h.
    const KNOWN: [(u32, &str); 8] = [
        (0x6969, "NFS"),
        (0xff53_4d42, "CIFS"),
        (0xfe53_4d42, "SMB"),
        (0x517b, "SMB"),
        (0x00c3_6400, "CephFS"),
        (0x0102_1997, "9p"),
        (0x5346_414f, "AFS"),
        (0x0bd0_0bd0, "Lustre"),
    ];
    let kind = rustix::fs::statfs(path)?.f_type as u32;
    Ok(KNOWN.iter().find(|(magic, _)| *magic == kind).map(|(_, name)| *name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_excludes_others_until_it_is_dropped() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("lock");
        let held = FileLock::acquire(&path).unwrap().expect("free");
        assert!(FileLock::acquire(&path).unwrap().is_none());
        let other = || std::process::Command::new("flock").arg("--nonblock").arg(&path).arg("true").status().unwrap();
        assert_eq!(other().code(), Some(1), "another process is excluded");
        drop(held);
        assert_eq!(other().code(), Some(0));
        let held = FileLock::acquire(&path).unwrap().expect("free again");
        // A file that was put in the lock's place is another lock, not ours.
        fs::rename(&path, tmp.path().join("aside")).unwrap();
        assert!(FileLock::acquire(&path).unwrap().is_some());
        drop(held);
    }

    #[test]
    fn a_lock_follows_no_symlink() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("lock");
        std::os::unix::fs::symlink(tmp.path().join("elsewhere"), &path).unwrap();
        assert_eq!(FileLock::acquire(&path).unwrap_err().raw_os_error(), Some(Errno::LOOP.raw_os_error()));
        assert!(!tmp.path().join("elsewhere").exists());
    }

    #[test]
    fn the_boot_id_is_the_kernels() {
        let text: String = boot_id().unwrap().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(text, fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim().replace('-', ""));
        assert_eq!(parse_uuid("00010203-0405-0607-0809-0a0b0c0d0eff"), Some([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]));
        for text in ["", "0001", "0001020304050607-0809-0a0b0c0d0e0f0", "0001020304050607-0809-0a0b0c0d0e0x"] {
            assert_eq!(parse_uuid(text), None, "{text}");
        }
    }

    #[test]
    fn memory_and_limits_are_of_this_process() {
        let (now, peak) = resident_bytes();
        assert!(now > 0 && peak >= now, "{now} {peak}");
        assert_eq!(status_bytes("VmHWM:\t    123 kB\nVmRSS:\t   100 kB\n", "VmRSS:"), 102_400);
        assert_eq!(status_bytes("VmHWM:\t    x kB\n", "VmHWM:"), 0);
        let limit = raise_open_files_limit();
        assert_eq!(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX), limit);
        assert_eq!(raise_open_files_limit(), limit);
        assert_eq!(open_files_limit_max(), limit);
    }

    #[test]
    fn this_host_will_do() {
        openat2_works().unwrap();
    }

    #[test]
    fn a_local_filesystem_is_no_network() {
        assert_eq!(network_filesystem(Path::new("/proc")).unwrap(), None);
    }

    #[test]
    fn what_is_given_up_is_gone_and_the_rest_stays() {
        // In a thread of its own: it is for good.
        let held = std::thread::spawn(|| {
            let before = rustix::thread::capabilities(None).unwrap();
            give_up_capability(Capability::SysAdmin).unwrap();
            let less = rustix::thread::capabilities(None).unwrap();
            assert_eq!(less.permitted, before.permitted - CapabilitySet::SYS_ADMIN);
            keep_capabilities(&[Capability::DacReadSearch]).unwrap();
            (before.permitted, rustix::thread::capabilities(None).unwrap())
        });
        let (before, after) = held.join().unwrap();
        assert_eq!(after.permitted, before & CapabilitySet::DAC_READ_SEARCH);
        assert_eq!(after.effective, after.permitted);
    }
}
