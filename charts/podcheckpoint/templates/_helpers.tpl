{{- define "podcheckpoint.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "podcheckpoint.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "podcheckpoint.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Labels that choose the controller's pods. The agents' are set by the controller: see agentSelector. */}}
{{- define "podcheckpoint.controllerSelector" -}}
app.kubernetes.io/name: {{ include "podcheckpoint.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: controller
{{- end -}}

{{/* Written into every agent's pod by the controller's program; not a matter of values. */}}
{{- define "podcheckpoint.agentSelector" -}}
app.kubernetes.io/name: podcheckpoint
app.kubernetes.io/component: agent
app.kubernetes.io/managed-by: podcheckpoint-controller
{{- end -}}

{{- define "podcheckpoint.labels" -}}
app.kubernetes.io/name: {{ include "podcheckpoint.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: podcheckpoint
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "podcheckpoint.controllerServiceAccount" -}}
{{- default (printf "%s-controller" (include "podcheckpoint.fullname" .)) .Values.controller.serviceAccount.name -}}
{{- end -}}

{{- define "podcheckpoint.agentServiceAccount" -}}
{{- default (printf "%s-agent" (include "podcheckpoint.fullname" .)) .Values.agent.serviceAccount.name -}}
{{- end -}}

{{/* Takes an image of the values and the root. */}}
{{- define "podcheckpoint.image" -}}
{{- $image := index . 0 -}}
{{- $root := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default $root.Chart.AppVersion $image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The controller refuses keys that it does not know. */}}
{{- define "podcheckpoint.controllerConfig" -}}
agent:
  image: {{ include "podcheckpoint.image" (list .Values.agent.image .) | quote }}
  imagePullPolicy: {{ .Values.agent.image.pullPolicy }}
  imagePullSecrets: {{ toJson .Values.imagePullSecrets }}
  serviceAccountName: {{ include "podcheckpoint.agentServiceAccount" . }}
  priorityClassName: {{ .Values.agent.priorityClassName | quote }}
  resources: {{ toJson .Values.agent.resources }}
  archiveRoot: {{ .Values.agent.archiveRoot | quote }}
  runtimeSocket: {{ .Values.agent.runtimeSocket | quote }}
  allowedPatches: {{ toJson .Values.securityPatches.allowed }}
  kubelet:
    enabled: {{ .Values.agent.kubelet.enabled }}
    port: {{ .Values.agent.kubelet.port | int }}
    caBundle: {{ .Values.agent.kubelet.caBundle | quote }}
  machinesInPods: {{ .Values.agent.machinesInPods }}
  idleTimeoutSeconds: {{ .Values.agent.idleTimeoutSeconds | int64 }}
  startTimeoutSeconds: {{ .Values.agent.startTimeoutSeconds | int64 }}
  logLevel: {{ .Values.agent.logLevel | quote }}
  logFormat: {{ .Values.agent.logFormat }}
  extraTolerations: {{ toJson .Values.agent.extraTolerations }}
{{- end -}}
