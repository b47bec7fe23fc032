//! coldspare's pair on one host, and the daemons of its peers.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use coldspare_sim::line::{FAR, Line};

use crate::process::Daemon;
use crate::report::{Result, program_version, run};

/// Both ends, installed and paired.
pub(crate) struct Pair {
    pub(crate) destination: PathBuf,
    active: PathBuf,
    standby: PathBuf,
    at: PathBuf,
    /// What the active's commands begin with, and the standby's.
    wrappers: [Vec<String>; 2],
}

impl Pair {
    /// Installs both ends in the folder `at`, with an empty standby.
    pub(crate) fn make(source: &Path, at: &Path) -> Result<Pair> {
        let port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        Pair::make_at(source, at, &format!("127.0.0.1:{port}"), Default::default())
    }

    /// The same, with the active at the near end of a line and the standby at the far one.
    pub(crate) fn across(line: &Line, source: &Path, at: &Path) -> Result<Pair> {
        Pair::make_at(source, at, &format!("{FAR}:7420"), [line.near().wrapper(), line.far().wrapper()])
    }

    fn make_at(source: &Path, at: &Path, listen: &str, wrappers: [Vec<String>; 2]) -> Result<Pair> {
        let destination = at.join("standby");
        fs::create_dir(&destination)?;
        let (standby, active) = (at.join("standby.toml"), at.join("active.toml"));
        let init = |role: &str, home: &Path, config: &Path| {
            let mut command = coldspare(&[]);
            command.args(["init", role, "--home"]).arg(home).arg("--config").arg(config);
            command
        };
        let invite = run(init("standby", &destination, &standby).args(["--listen", listen]))?;
        // The source keeps the mark of an earlier run's pair.
        let mark = source.join(".coldspare");
        if mark.exists() {
            fs::remove_dir_all(&mark)?;
        }
        run(init("active", source, &active).args(["--invite", invite.trim()]))?;
        Ok(Pair { destination, active, standby, at: at.into(), wrappers })
    }

    /// Sets what the active's watch is.
    pub(crate) fn watch_by(&self, backend: &str) -> Result<()> {
        let text = fs::read_to_string(&self.active)?;
        let is_ours = |line: &str| line == "[send]" || line.starts_with("watch =");
        let rest: String = text.lines().filter(|line| !is_ours(line)).map(|line| format!("{line}\n")).collect();
        Ok(fs::write(&self.active, format!("{rest}[send]\nwatch = \"{backend}\"\n"))?)
    }

    /// Adds sections to the active's configuration.
    pub(crate) fn configure(&self, sections: &str) -> Result<()> {
        let text = fs::read_to_string(&self.active)?;
        Ok(fs::write(&self.active, format!("{text}{sections}"))?)
    }

    pub(crate) fn receive(&self) -> Result<Daemon> {
        self.daemon(&self.wrappers[1], "receive", &self.standby)
    }

    pub(crate) fn send(&self) -> Result<Daemon> {
        self.daemon(&self.wrappers[0], "send", &self.active)
    }

    fn daemon(&self, wrapper: &[String], command: &str, config: &Path) -> Result<Daemon> {
        let log = self.at.join(format!("{command}.log"));
        let is_ready = || fs::read_to_string(&log).is_ok_and(|text| text.lines().any(|line| line == "ready"));
        Ok(Daemon::start(coldspare(wrapper).arg(command).arg("--config").arg(config), &log, is_ready)?)
    }

    pub(crate) fn send_once(&self) -> Command {
        self.on_active(&["send", "--once", "--json"])
    }

    /// The standby's configuration.
    pub(crate) fn standby_config(&self) -> PathBuf {
        self.standby.clone()
    }

    /// What the active's index takes on disk, and the standby's manifest, with all that the daemons keep beside them.
    pub(crate) fn state_bytes(&self) -> Result<[u64; 2]> {
        let below = |config: &Path| -> Result<u64> {
            let blocks = walkdir::WalkDir::new(config.with_extension("state")).into_iter().map(|entry| Ok(entry?.metadata()?.blocks()));
            Ok(blocks.sum::<Result<u64>>()? * 512)
        };
        Ok([below(&self.active)?, below(&self.standby)?])
    }

    /// A command for the active.
    pub(crate) fn on_active(&self, args: &[&str]) -> Command {
        let mut command = coldspare(&self.wrappers[0]);
        command.args(args).arg("--config").arg(&self.active);
        command
    }
}

pub(crate) fn coldspare(wrapper: &[String]) -> Command {
    wrapped(wrapper, env!("CARGO_BIN_EXE_coldspare"))
}

fn wrapped(wrapper: &[String], program: &str) -> Command {
    let Some((first, more)) = wrapper.split_first() else { return Command::new(program) };
    let mut command = Command::new(first);
    command.args(more).arg(program);
    command
}

/// An rsync daemon that takes a tree.
pub(crate) struct RsyncDaemon {
    pub(crate) daemon: Daemon,
    pub(crate) destination: PathBuf,
    pub(crate) url: String,
}

impl RsyncDaemon {
    /// Starts one in the folder `at`, with an empty tree.
    pub(crate) fn start(at: &Path) -> Result<RsyncDaemon> {
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        RsyncDaemon::start_at(at, "127.0.0.1", port, &[], || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok())
    }

    /// The same, at the far end of a line.
    pub(crate) fn across(line: &Line, at: &Path) -> Result<RsyncDaemon> {
        let is_ready = || line.far().enter(|| TcpStream::connect((FAR, 8730))).is_ok();
        RsyncDaemon::start_at(at, FAR, 8730, &line.far().wrapper(), is_ready)
    }

    fn start_at(at: &Path, address: &str, port: u16, wrapper: &[String], is_ready: impl Fn() -> bool) -> Result<RsyncDaemon> {
        let destination = at.join("standby");
        fs::create_dir(&destination)?;
        let (config, log) = (at.join("rsyncd.conf"), at.join("rsyncd.log"));
        let owner = if rustix::process::geteuid().is_root() { "uid = root\ngid = root\n" } else { "" };
        let module = format!("use chroot = no\n{owner}[standby]\npath = {}\nread only = no\n", destination.display());
        fs::write(&config, module)?;
        let mut serve = wrapped(wrapper, "rsync");
        serve.args(["--daemon", "--no-detach", &format!("--address={address}"), &format!("--port={port}")]);
        serve.arg(format!("--config={}", config.display()));
        let daemon = Daemon::start(&mut serve, &log, is_ready)?;
        Ok(RsyncDaemon { daemon, destination, url: format!("rsync://{address}:{port}/standby/") })
    }
}

impl RsyncDaemon {
    /// Sends a tree, all of it durable there afterwards; bytes that were sent, and seconds.
    pub(crate) fn push(&self, source: &Path) -> Result<(f64, f64)> {
        let start = Instant::now();
        let mut command = Command::new("rsync");
        command.args(["-aHAX", "--delete", "--stats", "--exclude=/.coldspare"]).arg(format!("{}/", source.display())).arg(&self.url);
        let told = run(&mut command)?;
        run(Command::new("sync").arg("-f").arg(&self.destination))?;
        let seconds = start.elapsed().as_secs_f64();
        let total = told.lines().find_map(|line| line.strip_prefix("Total bytes sent:")).ok_or("no total in rsync's output")?;
        Ok((total.chars().filter(char::is_ascii_digit).collect::<String>().parse()?, seconds))
    }
}

/// Fails unless both trees are equal in every entry, attribute and byte, by rsync's own judgement where it is there.
pub(crate) fn check_equal(source: &Path, destination: &Path) -> Result<()> {
    let mut command = Command::new("rsync");
    command.args(["-aHAXnc", "--delete", "--itemize-changes", "--exclude=/.coldspare"]);
    command.arg(format!("{}/", source.display())).arg(format!("{}/", destination.display()));
    if program_version("rsync").is_none() {
        run(Command::new("diff").arg("-r").arg("--exclude=.coldspare").arg(source).arg(destination))?;
        return Ok(());
    }
    let differences = run(&mut command)?;
    // The mark of the pair is made in the root and changes its time.
    let mut differences = differences.lines().filter(|line| !line.ends_with(" ./"));
    match differences.next() {
        None => Ok(()),
        Some(first) => Err(format!("the trees differ: {first} and {} more", differences.count()).into()),
    }
}

/// lsyncd with an rsync daemon to send to.
pub(crate) struct Lsyncd {
    pub(crate) destination: PathBuf,
    _lsyncd: Daemon,
    _rsync: RsyncDaemon,
}

impl Lsyncd {
    /// Starts both in the folder `at`; returns once the destination has all that `source` has.
    pub(crate) fn start(source: &Path, at: &Path) -> Result<Lsyncd> {
        let rsync = RsyncDaemon::start(at)?;
        let (config, log) = (at.join("lsyncd.lua"), at.join("lsyncd.log"));
        let text = format!(
            "settings {{ nodaemon = true }}\nsync {{ default.rsync, source = {source:?}, target = {:?}, delay = 1, delete = true,\n  \
             exclude = {{ '/.coldspare' }}, rsync = {{ archive = true, hard_links = true, acls = true, xattrs = true }} }}\n",
            rsync.url
        );
        fs::write(&config, text)?;
        // The first look is over once a file that was there at the start is there.
        let mark = "last-of-all";
        fs::write(source.join(mark), "")?;
        let there = rsync.destination.join(mark);
        let lsyncd = Daemon::start(Command::new("lsyncd").arg("-log").arg("all").arg(&config), &log, || there.exists())?;
        std::thread::sleep(std::time::Duration::from_secs(5));
        Ok(Lsyncd { destination: rsync.destination.clone(), _lsyncd: lsyncd, _rsync: rsync })
    }
}
