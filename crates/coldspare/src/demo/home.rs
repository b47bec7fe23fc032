//! A small home as Bitbucket lays it out, made with the real git.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::exit::Failure;

/// Repositories under the home; the last is a fork of the first.
const REPOSITORIES: [&str; 4] = ["1", "2", "3", "4"];
const FORK: &str = "4";
/// Where the data store keeps its repository.
const STORED: &str = "repositories/3f/9a/5";
/// What the exclude list leaves out.
pub(super) const LEFT_OUT: [&str; 5] = ["caches", "log", "tmp", "shared/data/db.mv.db", "plugins/.osgi-plugins"];

/// The folders of one host.
#[derive(Debug, Clone)]
pub(crate) struct Home {
    pub(crate) home: PathBuf,
    pub(crate) store: PathBuf,
}

impl Home {
    pub(crate) fn at(host: &Path) -> Home {
        Home { home: host.join("home"), store: host.join("store") }
    }

    pub(crate) fn create(&self) -> Result<(), Failure> {
        make_dir(&self.home)?;
        make_dir(&self.store)
    }

    pub(super) fn repository(&self, id: &str) -> PathBuf {
        self.home.join("shared/data/repositories").join(id)
    }

    /// An LFS object; its path is the SHA-256 of its content.
    pub(super) fn lfs_object(&self, digest: &str) -> PathBuf {
        self.home.join("shared/data/git-lfs/storage/1").join(&digest[..2]).join(&digest[2..])
    }

    pub(super) fn repositories(&self) -> Vec<PathBuf> {
        REPOSITORIES.iter().map(|id| self.repository(id)).chain([self.store.join(STORED)]).collect()
    }
}

/// Fills `home`; `work` gets a clone of each repository. Returns the digest of an LFS object.
pub(super) fn fill(home: &Home, work: &Path) -> Result<String, Failure> {
    for (n, path) in home.repositories().iter().enumerate() {
        let id = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if id == FORK {
            // Objects are borrowed by absolute path, as Bitbucket's forks do.
            let parent = home.repository(REPOSITORIES[0]);
            git(work, &["clone", "-q", "--bare", "--shared", &text(&parent), &text(path)])?;
        } else {
            git(work, &["init", "-q", "--bare", "-b", "main", &text(path)])?;
        }
        git(path, &["config", "gc.auto", "0"])?;
        git(path, &["config", "receive.autogc", "false"])?;
        write(&path.join("repository-config"), &format!("[bitbucket]\n\thierarchy = h{n}\n\tproject = DEMO\n\trepository = repo-{id}\n"))?;
        let clone = work.join(id);
        git(work, &["clone", "-q", &text(path), &text(&clone)])?;
        for commit in 0..2 {
            push(&clone, &format!("dir{commit}/file"), &format!("{id} {commit}\n").repeat(200))?;
        }
        let tag = format!("v{id}");
        git(&clone, &["tag", &tag])?;
        git(&clone, &["push", "-q", "origin", &tag, "HEAD:refs/heads/feature/a"])?;
        pull_request(path, "1")?;
    }
    rest(home)
}

/// Gives a repository a pull request, in the namespace that git doesn't know: one ref loose, one packed.
fn pull_request(repository: &Path, no: &str) -> Result<(), Failure> {
    let tip = git(repository, &["rev-parse", "refs/heads/main"])?;
    let before = git(repository, &["rev-parse", "refs/heads/main~1"])?;
    write(&repository.join(format!("stash-refs/pull-requests/{no}/from")), &format!("{}\n", tip.trim()))?;
    let packed = format!("# pack-refs with: peeled fully-peeled sorted \n{} stash-refs/pull-requests/{no}/to\n", before.trim());
    write(&repository.join("stash-packed-refs"), &packed)
}

fn rest(home: &Home) -> Result<String, Failure> {
    let root = &home.home;
    write(&root.join("shared/bitbucket.properties"), "jdbc.url=jdbc:postgresql://db/bitbucket\n")?;
    write(&root.join("shared/config/hook-scripts/7.sh"), "#!/bin/sh\nexit 0\n")?;
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
    };
    mode(&root.join("shared/config/hook-scripts/7.sh"), 0o755)?;
    mode(&root.join("shared/bitbucket.properties"), 0o600)?;
    for (path, repeat) in [
        ("shared/data/attachments/repository/1/a1/report.pdf", 20_000),
        ("shared/data/avatars/users/1/64.png", 300),
        ("shared/plugins/installed-plugins/plugin-1.2.jar", 50_000),
        ("lib/native/libtcnative.so", 10_000),
        (".lock", 0),
    ] {
        write(&root.join(path), &format!("{path}\n").repeat(repeat))?;
    }
    make_dir(&root.join("shared/data/attachments/repository/2"))?;
    for path in LEFT_OUT {
        let is_file = path.ends_with("db.mv.db");
        let path = if is_file { root.join(path) } else { root.join(path).join("inside") };
        write(&path, "rebuilt, or unsafe to copy\n")?;
    }
    let mut last = String::new();
    for n in 0..3 {
        let staged = root.join("shared/data/git-lfs/new");
        write(&staged, &format!("large file {n}\n").repeat(40_000))?;
        let sum = run(Command::new("sha256sum").arg(&staged))?;
        last = sum.get(..64).ok_or_else(|| Failure::usage("sha256sum printed no digest"))?.to_string();
        let object = home.lfs_object(&last);
        make_dir(object.parent().unwrap_or(root))?;
        fs::rename(&staged, &object).map_err(|e| Failure::usage(format!("{}: {e}", object.display())))?;
    }
    Ok(last)
}

/// Commits a file in a clone and pushes it.
pub(super) fn push(clone: &Path, file: &str, content: &str) -> Result<(), Failure> {
    write(&clone.join(file), content)?;
    git(clone, &["add", "-A"])?;
    git(clone, &["commit", "-q", "-m", file])?;
    git(clone, &["push", "-q", "origin", "HEAD:main"]).map(drop)
}

/// Runs git in `dir`, apart from any configuration of this host.
pub(crate) fn git(dir: &Path, args: &[&str]) -> Result<String, Failure> {
    run(git_command(dir).args(args))
}

/// git in `dir`, with nothing of this host's configuration.
pub(crate) fn git_command(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(dir).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").env("LC_ALL", "C");
    for name in ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES"] {
        command.env_remove(name);
    }
    for who in ["AUTHOR", "COMMITTER"] {
        command.env(format!("GIT_{who}_NAME"), "Demo").env(format!("GIT_{who}_EMAIL"), "demo@example.com");
    }
    command
}

/// Runs a command to its end and returns what it printed.
pub(crate) fn run(command: &mut Command) -> Result<String, Failure> {
    let shown = || {
        let args: Vec<_> = command.get_args().map(|a| a.to_string_lossy().into_owned()).collect();
        format!("{} {}", command.get_program().to_string_lossy(), args.join(" "))
    };
    let what = shown();
    let output = command.output().map_err(|e| Failure::usage(format!("{what}: {e}; is it installed?")))?;
    if !output.status.success() {
        return Err(Failure {
            code: crate::exit::Code::Differs,
            message: format!("{what}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim()),
            passes: false,
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

pub(crate) fn make_dir(path: &Path) -> Result<(), Failure> {
    fs::create_dir_all(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

pub(super) fn write(path: &Path, content: &str) -> Result<(), Failure> {
    if let Some(dir) = path.parent() {
        make_dir(dir)?;
    }
    fs::write(path, content).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
