//! What changes on the active while one side is killed.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::XattrFlags;

use crate::git::git_ok;
use crate::pair::Host;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scenario {
    /// The first changeset of all: a repository, a fork that borrows its objects, plain files, links.
    Seed,
    /// Loose objects and references; a changed, a deleted, a re-attributed plain file.
    Push,
    /// All objects into one pack, all references into one file.
    Repack,
    /// A branch becomes a folder of branches, a folder a file and the reverse, a project another.
    Rename,
    /// A large file changes in its middle, on a standby that had committed the changeset before and not applied it.
    Large,
}

pub(super) const SCENARIOS: [Scenario; 5] = [Scenario::Seed, Scenario::Push, Scenario::Repack, Scenario::Rename, Scenario::Large];

const REPOSITORY: &str = "shared/data/repositories/1";
const FORK: &str = "shared/data/repositories/2";
const MOVED: [&str; 2] = ["shared/data/projects/old/repository", "shared/data/projects/new/repository"];
const LARGE: &str = "shared/data/attachments/large";

impl Scenario {
    pub(super) fn name(self) -> &'static str {
        match self {
            Scenario::Seed => "seed",
            Scenario::Push => "push",
            Scenario::Repack => "repack",
            Scenario::Rename => "rename",
            Scenario::Large => "large",
        }
    }

    /// Where repositories are, at one time or another.
    pub(super) fn repositories() -> [&'static str; 4] {
        [REPOSITORY, FORK, MOVED[0], MOVED[1]]
    }

    /// Makes the home as the pair first knows it; for the seed, as it is to be sent.
    pub(super) fn make(self, at: &Host) {
        let (repository, fork) = (at.home.join(REPOSITORY), at.home.join(FORK));
        init(&repository);
        match self {
            Scenario::Seed => {
                commit(&repository, "refs/heads/main", 0..40);
                git_ok(&repository, &["repack", "-q", "-ad"]);
                commit(&repository, "refs/heads/main", 40..70);
                commit(&repository, "refs/heads/side", 70..72);
            }
            Scenario::Push | Scenario::Rename => {
                commit(&repository, "refs/heads/main", 0..10);
                commit(&repository, "refs/heads/a", 10..14);
                commit(&repository, "refs/heads/going", 14..15);
            }
            Scenario::Repack => {
                commit(&repository, "refs/heads/main", 0..10);
                git_ok(&repository, &["repack", "-q", "-adb"]);
                git_ok(&repository, &["pack-refs", "--all"]);
                commit(&repository, "refs/heads/main", 10..90);
                for n in 0..12 {
                    commit(&repository, &format!("refs/heads/branch{n}"), 90 + n..91 + n);
                }
            }
            Scenario::Large => commit(&repository, "refs/heads/main", 0..3),
        }
        init(&fork);
        // Relative, so that the fork works on both hosts: they are below different folders here.
        fs::write(fork.join("objects/info/alternates"), "../../1/objects\n").unwrap();
        let main = git_ok(&repository, &["rev-parse", "refs/heads/main"]);
        git_ok(&fork, &["update-ref", "refs/heads/main", main.trim()]);
        commit(&fork, "refs/heads/fork", 200..if self == Scenario::Seed { 215 } else { 203 });
        self.make_plain(at);
    }

    fn make_plain(self, at: &Host) {
        let many = if self == Scenario::Seed { 90 } else { 12 };
        for n in 0..many {
            let file = at.write(&format!("shared/plain/{}/{n}", n % 5), noise(n, 50 + 37 * n as usize));
            fs::set_permissions(&file, Permissions::from_mode(if n % 3 == 0 { 0o640 } else { 0o644 })).unwrap();
        }
        let several = at.write("shared/links/first", "one file, three names");
        for name in ["second", "third"] {
            fs::hard_link(&several, at.home.join("shared/links").join(name)).unwrap();
        }
        symlink("../plain/0/0", at.home.join("shared/links/relative")).unwrap();
        symlink("/nowhere/at all", at.home.join("shared/links/dangling")).unwrap();
        let sparse = File::create(at.home.join("shared/sparse")).unwrap();
        sparse.set_len(1 << 20).unwrap();
        sparse.write_all_at(b"after a hole", 600 << 10).unwrap();
        let attributed = at.write("shared/attributed", "attributes");
        rustix::fs::setxattr(&attributed, "user.test", b"before", XattrFlags::empty()).unwrap();
        for n in 0..6 {
            fs::write(at.store.join(format!("stored{n}")), noise(n, 300)).unwrap();
        }
        match self {
            Scenario::Rename => {
                at.write("shared/folder/x/1", "in a folder");
                at.write("shared/folder/x/deep/2", "deeper in a folder");
                at.write("shared/folder/y", "a file");
                let moved = at.home.join(MOVED[0]);
                init(&moved);
                commit(&moved, "refs/heads/main", 300..310);
                for n in 0..60 {
                    at.write(&format!("shared/data/projects/old/{}/{n}", n % 4), noise(n, 100));
                }
            }
            Scenario::Large => drop(at.write(LARGE, noise(1, 3 << 20))),
            _ => {}
        }
    }

    /// Makes the change numbered `step`, counted from 1.
    pub(super) fn change(self, at: &Host, step: u64) {
        let (repository, fork) = (at.home.join(REPOSITORY), at.home.join(FORK));
        match self {
            Scenario::Seed => unreachable!("a seed is one step"),
            Scenario::Push => {
                commit(&repository, "refs/heads/main", 20..50);
                commit(&repository, "refs/heads/pushed", 50..55);
                commit(&fork, "refs/heads/fork", 210..215);
                git_ok(&repository, &["update-ref", "-d", "refs/heads/going"]);
                at.write("shared/plain/0/0", "changed");
                at.write("shared/plain/fresh/1", "in a new folder");
                fs::remove_file(at.home.join("shared/plain/1/1")).unwrap();
                fs::remove_file(at.home.join("shared/links/second")).unwrap();
                let attributed = at.home.join("shared/attributed");
                fs::set_permissions(&attributed, Permissions::from_mode(0o600)).unwrap();
                rustix::fs::setxattr(&attributed, "user.test", b"after", XattrFlags::empty()).unwrap();
                fs::write(at.store.join("stored0"), "changed too").unwrap();
            }
            Scenario::Repack => {
                git_ok(&repository, &["repack", "-q", "-adb"]);
                git_ok(&repository, &["pack-refs", "--all"]);
            }
            Scenario::Rename => {
                let value = git_ok(&repository, &["rev-parse", "refs/heads/a"]);
                git_ok(&repository, &["update-ref", "-d", "refs/heads/a"]);
                git_ok(&repository, &["update-ref", "refs/heads/a/b", value.trim()]);
                commit(&repository, "refs/heads/a/c", 60..64);
                fs::remove_dir_all(at.home.join("shared/folder/x")).unwrap();
                at.write("shared/folder/x", "a file now");
                fs::remove_file(at.home.join("shared/folder/y")).unwrap();
                at.write("shared/folder/y/1", "a folder now");
                at.write("shared/folder/y/deep/2", "and deeper");
                let project = |name: &str| at.home.join("shared/data/projects").join(name);
                fs::rename(project("old"), project("new")).unwrap();
            }
            Scenario::Large => {
                let file = File::options().write(true).open(at.home.join(LARGE)).unwrap();
                file.write_all_at(&noise(step + 7, 64 << 10), step << 20).unwrap();
                commit(&repository, "refs/heads/main", 10 * step..10 * step + 4);
                for n in 0..6 {
                    at.write(&format!("shared/plain/{}/{n}", n % 5), noise(n + 100 * step, 500));
                }
                at.write(&format!("shared/plain/step{step}/1"), "in a new folder");
            }
        }
    }
}

fn init(repository: &Path) {
    fs::create_dir_all(repository).unwrap();
    git_ok(repository, &["init", "-q", "--bare", "-b", "main"]);
    fs::remove_dir_all(repository.join("hooks")).unwrap();
}

/// Adds commits on top of a branch, as loose objects.
fn commit(repository: &Path, branch: &str, numbers: std::ops::Range<u64>) {
    let mut stream = Vec::new();
    let mut from = PathBuf::from(branch);
    if crate::git::git(repository, &["rev-parse", "-q", "--verify", branch]).code != 0 {
        from = PathBuf::new();
    }
    for n in numbers {
        let text = format!("{n}\n").repeat(30);
        write!(stream, "commit {branch}\ncommitter Test <test@example.com> {} +0000\ndata 2\nc\n", 1_700_000_000 + n).unwrap();
        if !from.as_os_str().is_empty() {
            writeln!(stream, "from {}^0", from.display()).unwrap();
            from = PathBuf::new();
        }
        write!(stream, "M 100644 inline file{}\ndata {}\n{text}\n", n % 9, text.len()).unwrap();
    }
    stream.extend_from_slice(b"done\n");
    let mut command = Command::new("git");
    command.arg("-C").arg(repository).args(["-c", "fastimport.unpackLimit=100000", "fast-import", "--quiet", "--done"]);
    command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&stream).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Bytes that don't shrink.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}
