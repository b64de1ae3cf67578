// The browser's storage, for this tab and for all tabs. Where it is forbidden, as with cookies, this page's memory stands in.

class Memory {
	getItem(key) {
		return this[key] ?? null;
	}

	setItem(key, value) {
		this[key] = value;
	}

	removeItem(key) {
		delete this[key];
	}
}

function allowed(name) {
	try {
		return globalThis[name];
	} catch {
		return new Memory();
	}
}

export const tabStorage = allowed("sessionStorage");
export const browserStorage = allowed("localStorage");
export const isKept = !(browserStorage instanceof Memory);
