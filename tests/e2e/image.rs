//! Filesystems of their own, in images: small ones that get full, and ones whose power fails.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pair::{run, succeeds};

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
        let mount = Mount::again(image, at)?;
        let _ = fs::remove_dir(at.join("lost+found"));
        Some(mount)
    }

    /// Mounts an image that was mounted before.
    pub(crate) fn again(image: &Path, at: &Path) -> Option<Mount> {
        let mount = Mount::new(&["-o", "loop", &image.to_string_lossy()], at);
        if mount.is_none() {
            println!("skipped: a loop image can't be mounted here");
        }
        mount
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run(Command::new("umount").arg("-l").arg(&self.0));
    }
}
