// Swagger UI on openapi.json. It sends what it sends to wherever this page came from, also below a proxy's prefix.
"use strict";

const KEPT = "microbatch-key"; // where the page at / keeps the API key, for this tab alone

// What Swagger UI's markup lacks for those who hear it.
const ATTRIBUTES = {
  "#servers": { "aria-label": "Server" },
  ".examples-select-element": { "aria-label": "Example" },
  ".content-type": { "aria-label": "Media type" },
  ".body-param__text": { "aria-label": "Request body" },
  ".auth-container input": { "aria-label": "API key" },
  ".close-modal": { "aria-label": "Close" },
  ".modal-ux": { role: "dialog", "aria-modal": "true", "aria-label": "Authorization" },
  ".information-container": { role: "region", "aria-label": "About" },
  ".scheme-container": { role: "region", "aria-label": "Server and key" },
  ".responses-table": { role: "table" },
  "pre.microlight": { tabindex: 0 }, // they scroll
  ".opblock-tag, .models h4, .modal-ux h3": { "aria-level": 2 },
  ".opblock-title, .modal-ux h4, .modal-ux h6": { "aria-level": 3 },
};

// Links in the buttons that open operations: what is in a button cannot be reached by keyboard.
const plainText = ({ React }) => ({ components: { DeepLink: ({ text }) => React.createElement("span", {}, text) } });

function show(spec) {
  const url = new URL(".", location.href).href.replace(/\/$/, "");
  const ui = SwaggerUIBundle({
    spec: { ...spec, servers: [{ url }] },
    dom_id: "#api",
    deepLinking: true,
    tryItOutEnabled: true,
    validatorUrl: null,
    plugins: [plainText],
    onComplete: () => authorise(ui, spec),
  });
}

// After every change, because React draws again and again.
function mend() {
  for (const [selector, attributes] of Object.entries(ATTRIBUTES)) {
    for (const found of document.querySelectorAll(selector)) {
      for (const [name, value] of Object.entries(attributes)) found.setAttribute(name, value);
    }
  }
}

function authorise(ui, spec) {
  const key = keptKey();
  if (key && spec.components.securitySchemes) ui.preauthorizeApiKey("apiKey", key);
}

function keptKey() {
  try {
    return sessionStorage.getItem(KEPT);
  } catch {
    return null; // the browser forbids storage
  }
}

new MutationObserver(mend).observe(document.getElementById("api"), { childList: true, subtree: true });
document.documentElement.classList.toggle("dark-mode", matchMedia("(prefers-color-scheme: dark)").matches);

fetch("openapi.json")
  .then((response) => (response.ok ? response.json() : Promise.reject(new Error(`status ${response.status}`))))
  .then(show)
  .catch((error) => {
    document.getElementById("api").textContent = `Cannot load openapi.json: ${error.message}`;
  });
