//! Filesystems of their own, in images: small ones that get full, and ones whose power fails.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pair::{run, succeeds, until};

/// A mount that ends with the test.
pub(crate) struct Mount(PathBuf);

impl Mount {
    pub(crate) fn new(args: &[&str], at: &Path) -> Option<Mount> {
        let mut all = args.to_vec();
        let path = at.to_string_lossy();
        all.push(&path);
        succeeds("mount", &all).then(|| Mount(at.into()))
    }

    /// A new ext4 of `bytes` in the file `image`, mounted at `at`; says why not.
    pub(crate) fn ext4(image: &Path, bytes: u64, at: &Path) -> Option<Mount> {
        File::create(image).unwrap().set_len(bytes).unwrap();
        if !succeeds("mkfs.ext4", &["-q", &image.to_string_lossy()]) {
            println!("skipped: mkfs.ext4 is missing");
            return None;
        }
        let mount = Mount::new(&["-o", "loop", &image.to_string_lossy()], at);
        if mount.is_none() {
            println!("skipped: a loop image can't be mounted here");
        }
        let _ = fs::remove_dir(at.join("lost+found"));
        mount
    }

    /// A new XFS that can share blocks, of `bytes` in the file `image`, mounted at `at`; says why not.
    pub(crate) fn xfs(image: &Path, bytes: u64, at: &Path) -> Option<Mount> {
        File::create(image).unwrap().set_len(bytes).unwrap();
        if !succeeds("mkfs.xfs", &["-q", "-m", "reflink=1", &image.to_string_lossy()]) {
            println!("skipped: mkfs.xfs is missing");
            return None;
        }
        let mount = Mount::new(&["-o", "loop", &image.to_string_lossy()], at);
        if mount.is_none() {
            println!("skipped: a loop image can't be mounted here");
        }
        mount
    }

    /// Moves a folder and its content to a new ext4 of `bytes`, mounted in its place.
    pub(crate) fn instead_of(at: &Path, bytes: u64) -> Option<Mount> {
        let (image, kept) = (at.with_extension("image"), at.with_extension("kept"));
        fs::rename(at, &kept).unwrap();
        fs::create_dir(at).unwrap();
        let mount = Mount::ext4(&image, bytes, at)?;
        assert!(succeeds("cp", &["-a", &format!("{}/.", kept.display()), &at.to_string_lossy()]));
        Some(mount)
    }

    /// The power fails: what wasn't durable is gone once [`Mount::comes_back`]; false if this can't be done here.
    pub(crate) fn power_fails(&self) -> bool {
        // EXT4_IOC_SHUTDOWN is _IOR('X', 125, __u32); 2: without writing the journal first.
        let script = "import fcntl,os,struct,sys; fcntl.ioctl(os.open(sys.argv[1],os.O_RDONLY),0x8004587d,struct.pack('I',2))";
        succeeds("python3", &["-c", script, &self.0.to_string_lossy()])
    }

    /// The same filesystem after the host's restart; nobody may use the old one any more.
    pub(crate) fn comes_back(&self) {
        let path = self.0.to_string_lossy().into_owned();
        until("nobody uses the filesystem", || succeeds("umount", &[&path]));
        let image = self.0.with_extension("image");
        assert!(succeeds("mount", &["-o", "loop", &image.to_string_lossy(), &path]));
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(&self.0));
    }
}
