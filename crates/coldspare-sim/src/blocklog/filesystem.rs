//! The kernel's filesystems on a loop device.

use std::ffi::CStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags};
use tempfile::TempDir;

use super::device::Device;

/// One of the kernel's filesystems.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filesystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
}

impl Filesystem {
    /// As the kernel calls it.
    pub fn name(self) -> &'static str {
        match self {
            Filesystem::Ext4 => "ext4",
            Filesystem::Xfs => "xfs",
            Filesystem::Btrfs => "btrfs",
        }
    }

    /// What keeps it from being used here, if anything does.
    pub fn missing(self) -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("root is needed to mount".into());
        }
        if let Some(path) = ["/dev/fuse", "/dev/loop-control"].into_iter().find(|path| !Path::new(path).exists()) {
            return Some(format!("no {path}"));
        }
        let (make, package) = match self {
            Filesystem::Ext4 => ("mkfs.ext4", "e2fsprogs"),
            Filesystem::Xfs => ("mkfs.xfs", "xfsprogs"),
            Filesystem::Btrfs => ("mkfs.btrfs", "btrfs-progs"),
        };
        for (command, package) in [(make, package), ("losetup", "mount")] {
            if run(command, &["--help"]).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
                return Some(format!("no {command}: install the package {package}"));
            }
        }
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        let is_known = known.lines().any(|line| line.trim_start_matches("nodev").trim() == self.name());
        (!is_known && run("modprobe", &[self.name()]).is_err()).then(|| format!("this kernel has no {}", self.name()))
    }

    /// The least that its tools make, or little more; untouched parts cost nothing.
    fn image_bytes(self) -> usize {
        match self {
            Filesystem::Ext4 => 96 << 20,
            Filesystem::Xfs => 320 << 20,
            Filesystem::Btrfs => 256 << 20,
        }
    }

    fn make(self, device: &str) -> io::Result<()> {
        let (command, arguments): (_, &[&str]) = match self {
            // As on a large disk: 4 KiB blocks, and nothing left to be initialised while it is mounted.
            Filesystem::Ext4 => ("mkfs.ext4", &["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"]),
            Filesystem::Xfs => ("mkfs.xfs", &["-q", "-f"]),
            Filesystem::Btrfs => ("mkfs.btrfs", &["-q", "-f"]),
        };
        run(command, &[arguments, &[device]].concat()).map(drop)
    }

    fn mount_data(self) -> &'static CStr {
        match self {
            Filesystem::Ext4 | Filesystem::Xfs => c"",
            Filesystem::Btrfs => c"nodiscard",
        }
    }
}

/// A filesystem on a loop device on a [`Device`].
///
/// Fields are dropped in their order: first the loop device, then what it stands on, then the folders.
pub struct Disk {
    /// Which one.
    pub filesystem: Filesystem,
    attached: Loop,
    /// What it is on.
    pub device: Device,
    mount_point: PathBuf,
    _dir: TempDir,
}

/// A mounted filesystem; dropped, it isn't any more.
pub struct Mounted<'a>(&'a Path);

struct Loop(String);

impl Disk {
    /// Makes an empty one.
    ///
    /// # Errors
    /// Of mounting, and of the commands, with what they said.
    pub fn new(filesystem: Filesystem) -> io::Result<Disk> {
        remove_left_over();
        let dir = tempfile::Builder::new().prefix(&format!("{PREFIX}{}-", std::process::id())).tempdir()?;
        let (served, mount_point) = (dir.path().join(DEVICE), dir.path().join(filesystem.name()));
        std::fs::create_dir(&served)?;
        std::fs::create_dir(&mount_point)?;
        let device = Device::serve(&served, filesystem.image_bytes())?;
        let attached = Loop::attach(&device.path())?;
        filesystem.make(&attached.0)?;
        Ok(Disk { filesystem, attached, device, mount_point, _dir: dir })
    }

    /// Where it is mounted.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// Mounts it, which recovers it as after a power cut.
    ///
    /// # Errors
    /// As `mount(2)`.
    pub fn mount(&self) -> io::Result<Mounted<'_>> {
        let (source, kind) = (self.attached.0.as_str(), self.filesystem.name());
        rustix::mount::mount(source, &self.mount_point, kind, MountFlags::NOATIME, self.filesystem.mount_data())?;
        Ok(Mounted(&self.mount_point))
    }
}

impl Mounted<'_> {
    /// Unmounts it.
    ///
    /// # Errors
    /// Something in it stays open.
    pub fn unmount(self) -> io::Result<()> {
        let at = self.0;
        std::mem::forget(self);
        unmount(at)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if unmount(self.0).is_err() {
            let _ = rustix::mount::unmount(self.0, UnmountFlags::DETACH);
        }
    }
}

/// A process that another thread starts holds our files until it runs its own program: that passes.
fn unmount(at: &Path) -> io::Result<()> {
    wait_for(|| match rustix::mount::unmount(at, UnmountFlags::empty()) {
        Err(rustix::io::Errno::BUSY) => None,
        other => Some(other.map_err(io::Error::from)),
    })
    .unwrap_or_else(|| Err(io::Error::other(format!("{} stays in use", at.display()))))
}

impl Loop {
    fn attach(file: &Path) -> io::Result<Loop> {
        let file = file.to_str().ok_or_else(|| io::Error::other("a path that is no text"))?;
        // They are few, and others use them too.
        let mut last = None;
        let name = wait_for(|| match run("losetup", &["--find", "--show", file]) {
            Ok(name) => Some(name),
            Err(e) => {
                last = Some(e);
                None
            }
        });
        name.map(|name| Loop(name.trim().into())).ok_or_else(|| last.unwrap_or_else(|| io::Error::other("no loop device")))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Err(e) = run("losetup", &["--detach", &self.0]) {
            eprintln!("{e}");
        }
    }
}

const PREFIX: &str = "coldspare-blocklog-";
const DEVICE: &str = "device";
const WAIT: Duration = Duration::from_secs(30);
const BETWEEN_TRIES: Duration = Duration::from_millis(5);

fn wait_for<T>(mut ready: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        if let Some(out) = ready() {
            return Some(out);
        }
        if start.elapsed() > WAIT {
            return None;
        }
        std::thread::sleep(BETWEEN_TRIES);
    }
}

/// Runs a command to its end; its failure says what it said.
fn run(command: &str, arguments: &[&str]) -> io::Result<String> {
    let out = Command::new(command).args(arguments).output()?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        return Err(io::Error::other(format!("{command} {}: {}", arguments.join(" "), said.trim())));
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Unmounts and detaches what a killed run left.
///
/// A thread of it may still wait for its own device, which nobody serves any more: it can't end before that is aborted,
/// and a forced unmount does so, also where it fails.
fn remove_left_over() {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points: Vec<_> = mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|point| is_of_dead(point)).collect();
    let loops = run("losetup", &["--list", "--noheadings", "--output", "NAME,BACK-FILE"]).unwrap_or_default();
    let loops = loops.lines().filter_map(|line| line.trim().split_once(' ')).filter(|(_, file)| is_of_dead(file));
    let (devices, others): (Vec<_>, Vec<_>) = points.into_iter().partition(|point| point.ends_with(DEVICE));
    for device in &devices {
        let _ = rustix::mount::unmount(*device, UnmountFlags::FORCE);
    }
    for point in others {
        let _ = rustix::mount::unmount(point, UnmountFlags::DETACH);
    }
    for (name, _) in loops {
        let _ = run("losetup", &["--detach", name]);
    }
    for device in devices {
        let _ = rustix::mount::unmount(device, UnmountFlags::DETACH);
        let _ = Path::new(device).parent().map(std::fs::remove_dir_all);
    }
}

/// Whether a path below a folder of ours belongs to a process that ended, or that was told to.
fn is_of_dead(path: &str) -> bool {
    let Some(pid) = path.split_once(PREFIX).and_then(|(_, rest)| rest.split('-').next()) else { return false };
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Ok(stat) => stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['Z', 'X'])),
        Err(e) => e.kind() == io::ErrorKind::NotFound,
    }
}
