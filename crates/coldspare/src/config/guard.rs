//! The sections `[guard]`, `[hooks]` and `[health]`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use coldspare_failover::dead::Search;
use coldspare_failover::health::Url;
use coldspare_failover::hook::{Hook, Leftovers};
use coldspare_failover::ladder::{BeforeFailover, Limits};
use serde::{Deserialize, Serialize};

/// What is known of the application by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApplicationProfile {
    /// Nothing: the configuration says all.
    #[default]
    Generic,
    /// Bitbucket, as a systemd unit or by the scripts of its installation.
    Bitbucket,
}

/// The application, and how it is kept alive.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Guard {
    /// What is known of it by itself.
    pub profile: ApplicationProfile,
    /// The systemd unit that it runs as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// Where it is installed, if it is run by its scripts instead of as a unit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub install: Option<PathBuf>,
    /// The user that its scripts are run as.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Holds the number of its main process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid_file: Option<PathBuf>,
    /// Pieces of text of which an argument of each of its processes has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patterns: Option<Vec<String>>,
    /// TCP ports that are its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<u16>>,
    /// Files that it locks, relative to the first root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lock_files: Option<Vec<PathBuf>>,
    /// Short names of programs that may use the roots.
    pub ignore: Vec<String>,
    /// Where it tells its state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status_url: Option<String>,
    /// Seconds between looks.
    pub check_seconds: u64,
    /// Seconds that its status may take.
    pub status_timeout_seconds: u64,
    /// Looks in a row that have to find it unhealthy.
    pub failures: u32,
    /// Seconds that it may take to stop.
    pub grace_seconds: u64,
    /// Seconds more.
    pub margin_seconds: u64,
    /// Seconds until what was killed has to be gone.
    pub kill_wait_seconds: u64,
    /// Seconds from its start until it serves.
    pub start_limit_seconds: u64,
    /// Attempts before the failover command runs.
    pub attempts: u32,
    /// Seconds after the first attempt that failed; doubles.
    pub backoff_seconds: u64,
    /// The longest that becomes.
    pub backoff_max_seconds: u64,
    /// Seconds of health after which attempts are forgotten.
    pub forget_seconds: u64,
    /// Below so many free MB in a root people are told; 0: never.
    pub min_free_mb: u64,
    /// Whether the failover command fences this host itself.
    pub failover_fences: bool,
    /// Gets a POST with a JSON object for whatever people are told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub webhook: Option<String>,
}

impl Default for Guard {
    fn default() -> Guard {
        Guard {
            profile: ApplicationProfile::Generic,
            unit: None,
            install: None,
            user: None,
            pid_file: None,
            patterns: None,
            ports: None,
            lock_files: None,
            ignore: Vec::new(),
            status_url: None,
            check_seconds: 10,
            status_timeout_seconds: 5,
            failures: 3,
            grace_seconds: 30,
            margin_seconds: 15,
            kill_wait_seconds: 15,
            start_limit_seconds: 600,
            attempts: 2,
            backoff_seconds: 30,
            backoff_max_seconds: 300,
            forget_seconds: 600,
            min_free_mb: 512,
            failover_fences: false,
            webhook: None,
        }
    }
}

/// Where load balancers ask.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HealthSettings {
    /// By HTTP.
    pub listen: SocketAddr,
    /// By HAProxy's agent-check.
    pub agent_listen: SocketAddr,
}

impl Default for HealthSettings {
    fn default() -> HealthSettings {
        HealthSettings { listen: SocketAddr::from(([127, 0, 0, 1], 7421)), agent_listen: SocketAddr::from(([127, 0, 0, 1], 7422)) }
    }
}

/// One command.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HookConfig {
    /// The program, absolute, and its arguments.
    pub command: Vec<String>,
    /// Seconds that it may take.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit_seconds: Option<u64>,
    /// Added to its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
}

/// Commands by what they are for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Hooks(BTreeMap<HookName, HookConfig>);

/// What a command is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HookName {
    /// Starts the application.
    Start,
    /// Asks it to stop.
    Stop,
    /// Kills it.
    Kill,
    /// Tells its state.
    Status,
    /// Makes sure that the other host can't write any more.
    Fence,
    /// Makes sure that this host can't write any more.
    FenceSelf,
    /// Sends requests to this host.
    Route,
    /// Tells people.
    Notify,
    /// Has the application finish what it does, and take nothing new.
    Drain,
    /// Prepares the application for its new role.
    Promote,
    /// Hands over to the other host.
    Failover,
}

/// LIMIT: seconds, of anything in these sections.
const SECONDS_MAX: u64 = 7 * 86_400;
/// Where systemd's and util-linux's programs are.
const SYSTEMCTL: &str = "/usr/bin/systemctl";
const RUNUSER: &str = "/usr/sbin/runuser";

impl HookName {
    /// All of them.
    pub const ALL: [HookName; 11] = [
        HookName::Start,
        HookName::Stop,
        HookName::Kill,
        HookName::Status,
        HookName::Fence,
        HookName::FenceSelf,
        HookName::Route,
        HookName::Notify,
        HookName::Drain,
        HookName::Promote,
        HookName::Failover,
    ];

    /// As on the command line, and in `COLDSPARE_HOOK`.
    pub fn word(self) -> &'static str {
        match self {
            HookName::Start => "start",
            HookName::Stop => "stop",
            HookName::Kill => "kill",
            HookName::Status => "status",
            HookName::Fence => "fence",
            HookName::FenceSelf => "fence-self",
            HookName::Route => "route",
            HookName::Notify => "notify",
            HookName::Drain => "drain",
            HookName::Promote => "promote",
            HookName::Failover => "failover",
        }
    }

    fn default_limit(self, guard: &Guard) -> Duration {
        Duration::from_secs(match self {
            HookName::Stop => guard.grace_seconds + guard.margin_seconds,
            HookName::Status => guard.status_timeout_seconds,
            HookName::Start => 120,
            HookName::Kill | HookName::Notify => 30,
            HookName::Fence | HookName::FenceSelf | HookName::Route | HookName::Drain => 60,
            HookName::Promote | HookName::Failover => 600,
        })
    }
}

impl FromStr for HookName {
    type Err = String;

    fn from_str(text: &str) -> Result<HookName, String> {
        HookName::ALL.into_iter().find(|name| name.word() == text).ok_or_else(|| {
            let all: Vec<&str> = HookName::ALL.iter().map(|n| n.word()).collect();
            format!("expected one of {}", all.join(", "))
        })
    }
}

impl Hooks {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the configuration itself has a command for `name`.
    pub fn has(&self, name: HookName) -> bool {
        self.0.contains_key(&name)
    }

    pub(super) fn check(&self) -> Result<(), String> {
        for (name, hook) in &self.0 {
            let fail = |what: String| Err(format!("hooks.{}: {what}", name.word().replace('-', "_")));
            match hook.command.first() {
                None => return fail("command is empty".into()),
                Some(program) if !program.starts_with('/') => {
                    return fail(format!("command: {program:?} must be an absolute path; there is no shell"));
                }
                Some(_) => {}
            }
            if hook.command.iter().any(|word| word.contains('\0')) {
                return fail("command: NUL in an argument".into());
            }
            if hook.limit_seconds.is_some_and(|seconds| !(1..=SECONDS_MAX).contains(&seconds)) {
                return fail(format!("limit_seconds is not between 1 and {SECONDS_MAX}"));
            }
            if let Some((key, _)) = hook
                .environment
                .iter()
                .find(|(key, value)| key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') || key.starts_with("COLDSPARE_"))
            {
                return fail(format!("environment: {key:?} can't be set"));
            }
        }
        Ok(())
    }

    /// The command for `name`: the configuration's, else the profile's; `None` where there is neither.
    ///
    /// `state` is the state folder.
    pub fn resolve(&self, name: HookName, guard: &Guard, state: &Path) -> Option<Hook> {
        let leftovers = match name {
            HookName::Start => Leftovers::Kept { output: state.join("start.log") },
            _ => Leftovers::Killed,
        };
        let limit = name.default_limit(guard);
        let Some(hook) = self.0.get(&name) else {
            return guard.own_command(name).map(|command| Hook { command, environment: Vec::new(), limit, leftovers });
        };
        Some(Hook {
            command: hook.command.clone(),
            environment: hook.environment.clone().into_iter().collect(),
            limit: hook.limit_seconds.map_or(limit, Duration::from_secs),
            leftovers,
        })
    }
}

impl Guard {
    pub(super) fn check(&self, hooks: &Hooks) -> Result<(), String> {
        for (key, value, min) in [
            ("check_seconds", self.check_seconds, 1),
            ("status_timeout_seconds", self.status_timeout_seconds, 1),
            ("failures", self.failures.into(), 1),
            ("grace_seconds", self.grace_seconds, 1),
            ("margin_seconds", self.margin_seconds, 0),
            ("kill_wait_seconds", self.kill_wait_seconds, 1),
            ("start_limit_seconds", self.start_limit_seconds, 1),
            ("attempts", self.attempts.into(), 1),
            ("backoff_seconds", self.backoff_seconds, 0),
            ("backoff_max_seconds", self.backoff_max_seconds, 0),
            ("forget_seconds", self.forget_seconds, 1),
        ] {
            if !(min..=SECONDS_MAX).contains(&value) {
                return Err(format!("guard.{key} = {value} is not between {min} and {SECONDS_MAX}"));
            }
        }
        for (key, path) in [("install", &self.install), ("pid_file", &self.pid_file)] {
            if path.as_ref().is_some_and(|path| !path.is_absolute()) {
                return Err(format!("guard.{key} must be an absolute path"));
            }
        }
        if self.unit.is_some() && self.install.is_some() {
            return Err("guard: unit and install are two ways to run the application; give one".into());
        }
        for name in [HookName::Start, HookName::Stop] {
            if hooks.resolve(name, self, Path::new("/")).is_none() {
                return Err(format!("guard: the profile knows no command to {0} the application; set hooks.{0}", name.word()));
            }
        }
        for url in [self.status_url(), self.webhook.clone()].into_iter().flatten() {
            url.parse::<Url>().map_err(|e| format!("guard: {e}"))?;
        }
        if self.status_url().is_none() && hooks.resolve(HookName::Status, self, Path::new("/")).is_none() {
            return Err("guard: nothing tells the application's state; set guard.status_url or hooks.status".into());
        }
        Ok(())
    }

    /// Where the application tells its state.
    pub fn status_url(&self) -> Option<String> {
        let own = (self.profile == ApplicationProfile::Bitbucket).then(|| "http://127.0.0.1:7990/status".to_string());
        self.status_url.clone().or(own)
    }

    /// How the application is known; `roots` are resolved, the home first.
    pub fn search(&self, roots: Vec<PathBuf>) -> Search {
        let is_bitbucket = self.profile == ApplicationProfile::Bitbucket;
        let home = roots.first().cloned().unwrap_or_default();
        let patterns = || if is_bitbucket { vec![format!("-Dbitbucket.home={}", home.display())] } else { Vec::new() };
        let ports = || if is_bitbucket { vec![7990, 7999, 7992, 5701] } else { Vec::new() };
        let lock_files = || if is_bitbucket { vec![PathBuf::from(".lock"), PathBuf::from("shared/.lock")] } else { Vec::new() };
        Search {
            pid_file: self.pid_file.clone(),
            unit: self.unit(),
            patterns: self.patterns.clone().unwrap_or_else(patterns),
            ports: self.ports.clone().unwrap_or_else(ports),
            lock_files: self.lock_files.clone().unwrap_or_else(lock_files).into_iter().map(|path| home.join(path)).collect(),
            ignore: self.ignore.clone(),
            roots,
        }
    }

    /// The ladder's limits.
    pub fn limits(&self) -> Limits {
        let seconds = Duration::from_secs;
        Limits {
            failures: self.failures,
            stop_wait: seconds(self.grace_seconds + self.margin_seconds),
            kill_wait: seconds(self.kill_wait_seconds),
            prove_every: Duration::from_millis(500),
            start_limit: seconds(self.start_limit_seconds),
            attempts: self.attempts,
            backoff: seconds(self.backoff_seconds),
            backoff_max: seconds(self.backoff_max_seconds),
            forget_after: seconds(self.forget_seconds),
            before_failover: if self.failover_fences { BeforeFailover::CommandFences } else { BeforeFailover::Fence },
        }
    }

    /// The systemd unit that the application runs as.
    pub fn unit(&self) -> Option<String> {
        let is_bitbuckets = self.profile == ApplicationProfile::Bitbucket && self.install.is_none();
        self.unit.clone().or(is_bitbuckets.then(|| "atlbitbucket".into()))
    }

    /// What the profile does for `name`.
    fn own_command(&self, name: HookName) -> Option<Vec<String>> {
        let verb = match name {
            HookName::Start => "start",
            HookName::Stop => "stop",
            _ => return None,
        };
        if let Some(unit) = self.unit() {
            return Some([SYSTEMCTL, verb, unit.as_str()].map(String::from).to_vec());
        }
        let install = self.install.as_ref().filter(|_| self.profile == ApplicationProfile::Bitbucket)?;
        let script = install.join(format!("bin/{verb}-bitbucket.sh")).display().to_string();
        let user = self.user.as_deref().unwrap_or("atlbitbucket");
        Some([RUNUSER, "-u", user, "--", script.as_str()].map(String::from).to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(&format!("state = \"/s\"\n[[root]]\nname = \"home\"\npath = \"/srv/home\"\n{text}"))
    }

    fn check(text: &str, expected_in_error: &str) {
        let error = parse(text).expect_err("refused");
        assert!(error.contains(expected_in_error), "{error}");
    }

    #[test]
    fn bitbucket_needs_no_more_than_its_name() {
        let config = parse("[guard]\nprofile = \"bitbucket\"\n").unwrap();
        let guard = config.guard.unwrap();
        let start = config.hooks.resolve(HookName::Start, &guard, Path::new("/s")).unwrap();
        assert_eq!(start.command, ["/usr/bin/systemctl", "start", "atlbitbucket"]);
        let search = guard.search(vec!["/srv/home".into()]);
        assert_eq!(search.unit.as_deref(), Some("atlbitbucket"));
        assert_eq!(search.lock_files[1], Path::new("/srv/home/shared/.lock"));
        assert_eq!(guard.limits().stop_wait, Duration::from_secs(45));
    }

    #[test]
    fn scripts_are_run_as_their_user_and_hooks_come_first() {
        let config = parse(
            "[guard]\nprofile = \"bitbucket\"\ninstall = \"/opt/bb\"\n[hooks.stop]\ncommand = [\"/x\", \"a b\"]\nlimit_seconds = 7\n",
        )
        .unwrap();
        let guard = config.guard.unwrap();
        let resolve = |name| config.hooks.resolve(name, &guard, Path::new("/s"));
        assert_eq!(resolve(HookName::Start).unwrap().command[2..], ["atlbitbucket", "--", "/opt/bb/bin/start-bitbucket.sh"]);
        let stop = resolve(HookName::Stop).unwrap();
        assert_eq!((stop.command, stop.limit), (vec!["/x".into(), "a b".into()], Duration::from_secs(7)));
        assert_eq!(resolve(HookName::Failover), None);
        assert_eq!(guard.search(vec!["/srv/home".into()]).unit, None);
    }

    #[test]
    fn mistakes_are_named() {
        check("[guard]\n", "hooks.start");
        check("[guard]\nunit = \"x\"\n", "status_url");
        check("[guard]\nprofile = \"bitbucket\"\nattempts = 0\n", "guard.attempts = 0");
        check("[guard]\nprofile = \"bitbucket\"\nunit = \"a\"\ninstall = \"/b\"\n", "give one");
        check("[guard]\nprofile = \"bitbucket\"\nstatus_url = \"https://x/\"\n", "https");
        check("[hooks.fence]\ncommand = [\"stonith\"]\n", "hooks.fence: command: \"stonith\" must be an absolute path");
        check("[hooks.fence_self]\ncommand = []\n", "hooks.fence_self: command is empty");
        check("[hooks.route]\ncommand = [\"/x\"]\nenvironment = { COLDSPARE_ROLE = \"active\" }\n", "can't be set");
    }
}
