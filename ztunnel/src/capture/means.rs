//! Who brings a pod's connections to us: our eBPF programs, or somebody else's rules. Takes pods, gives
//! the same listeners and sockets either way; it never mixes the two in one process.

use std::sync::Arc;

use super::{
    Capture, Dialer, Error, External, ExternalPod, Netns, NetnsCookie, PodCapture, PodSettings,
    WorkerListeners,
};

/// The node's way of capturing.
#[derive(Clone, Debug)]
pub enum Means {
    /// Our programs.
    Ebpf(Capture),
    /// Somebody else's rules.
    External(External),
}

/// A pod that is captured. Dropping it changes nothing.
#[derive(Clone, Debug)]
pub enum PodMeans {
    /// By our programs.
    Ebpf(PodCapture),
    /// By somebody else's rules.
    External(ExternalPod),
}

impl Means {
    /// Serves a pod: its new connections come to the listeners returned, one set a worker.
    ///
    /// # Errors
    /// Nothing is left half done.
    pub fn enrol(
        &self,
        netns: &Arc<Netns>,
        settings: &PodSettings,
    ) -> Result<(PodMeans, Vec<WorkerListeners>), Error> {
        match self {
            Self::Ebpf(capture) => {
                let (pod, listeners) = capture.enrol(netns, settings)?;
                Ok((PodMeans::Ebpf(pod), listeners))
            }
            Self::External(external) => {
                let (pod, listeners) = external.enrol(netns, settings)?;
                Ok((PodMeans::External(pod), listeners))
            }
        }
    }

    /// The pods that are captured, also by a process before this one.
    ///
    /// # Errors
    /// The pins cannot be read.
    pub fn enrolled(&self) -> Result<Vec<NetnsCookie>, Error> {
        match self {
            Self::Ebpf(capture) => capture.enrolled(),
            Self::External(_) => Ok(Vec::new()),
        }
    }

    /// Writes down what a captured pod's node agent calls it; a pod that no agent has has no name.
    ///
    /// # Errors
    /// The pod is not captured by our programs, or the name holds a zero byte.
    pub fn set_name(&self, cookie: NetnsCookie, uid: Option<&str>) -> Result<(), Error> {
        match self {
            Self::Ebpf(capture) => capture.set_name(cookie, uid),
            // The rules are their owner's, who takes them away by itself.
            Self::External(_) => Ok(()),
        }
    }

    /// Whether a captured pod is some node agent's.
    #[must_use]
    pub fn is_named(&self, cookie: NetnsCookie) -> bool {
        match self {
            Self::Ebpf(capture) => capture.is_named(cookie),
            Self::External(_) => false,
        }
    }

    /// The captured pods that a source calls so.
    ///
    /// # Errors
    /// The pins cannot be read.
    pub fn named(&self, uid: &str) -> Result<Vec<NetnsCookie>, Error> {
        match self {
            Self::Ebpf(capture) => capture.named(uid),
            Self::External(_) => Ok(Vec::new()),
        }
    }

    /// Undoes the capture of one pod.
    ///
    /// # Errors
    /// Something could not be undone.
    pub fn release(&self, cookie: NetnsCookie) -> Result<(), Error> {
        match self {
            Self::Ebpf(capture) => capture.release(cookie),
            Self::External(_) => Ok(()),
        }
    }

    /// Lets go of a pod's namespace and leaves its capture as it is.
    pub fn abandon(&self, cookie: NetnsCookie) {
        match self {
            Self::Ebpf(capture) => capture.abandon(cookie),
            Self::External(_) => {}
        }
    }

    /// Forgets the pods whose namespace is gone, and names them.
    ///
    /// # Errors
    /// The pins cannot be read or removed.
    pub fn collect(&self) -> Result<Vec<NetnsCookie>, Error> {
        match self {
            Self::Ebpf(capture) => capture.collect(),
            Self::External(_) => Ok(Vec::new()),
        }
    }
}

impl PodMeans {
    /// Changes the settings; connections that are open keep theirs.
    ///
    /// # Errors
    /// The settings do not fit, or the pod was released.
    pub fn update(&self, settings: &PodSettings) -> Result<(), Error> {
        match self {
            Self::Ebpf(pod) => pod.update(settings),
            Self::External(_) => Ok(()),
        }
    }

    /// Puts back what the pod took away of its capture; true if something was gone.
    ///
    /// # Errors
    /// It cannot be put back.
    pub fn repair(&self) -> Result<bool, Error> {
        match self {
            Self::Ebpf(pod) => pod.repair(),
            Self::External(_) => Ok(false),
        }
    }

    /// Makes sockets in the pod, which has these settings.
    #[must_use]
    pub fn dialer(&self, settings: &PodSettings) -> Dialer {
        match self {
            Self::Ebpf(pod) => pod.dialer(settings),
            Self::External(pod) => pod.dialer(settings),
        }
    }
}
